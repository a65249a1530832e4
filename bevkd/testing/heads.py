"""What a head has to hold."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from bevkd.grid import BEVGrid
from bevkd.testing.frames import MadeUpFrames
from bevkd.testing.tools import check_gradients, check_terms, close
from bevkd.types import Boxes

IN_CHANNELS = 64
"""Enough for a head without hidden layers, as that of anchors, to tell the cells of a random map apart."""


class HeadTests:
    """Subclass it and define :meth:`head`."""

    grid = BEVGrid(x_m=(-12.8, 12.8), y_m=(-9.6, 9.6), z_m=(-5.0, 3.0), cell_m=1.6)
    """Not square, so that exchanged axes show."""

    classes = ("car", "truck", "pedestrian")

    def head(self, in_channels: int) -> Any:
        """Return the head for ``grid`` and ``classes``, drawn anew by every call, as small as it gets."""
        raise NotImplementedError("define head()")

    def _head(self) -> Any:
        torch.manual_seed(0)
        return self.head(IN_CHANNELS)

    def _maps(self, frames: int = 2) -> Tensor:
        rows, columns = self.grid.shape
        chance = torch.Generator().manual_seed(0)
        return torch.randn(frames, IN_CHANNELS, rows, columns, generator=chance).relu_()

    def _boxes(self) -> Boxes:
        return MadeUpFrames(self.classes, self.grid).annotations("frame-0")

    def test_it_has_class_logits_and_box_codes(self) -> None:
        """``heatmap`` has a channel per class, ``box_code`` ten values per task; every class is in one task."""
        head, (rows, columns) = self._head(), self.grid.shape
        output = head(self._maps())
        tasks = head.labels_of_task
        assert sorted(label for labels in tasks for label in labels) == list(range(len(self.classes)))
        assert tuple(output.heatmap.shape) == (2, len(self.classes), rows, columns), tuple(output.heatmap.shape)
        assert tuple(output.box_code.shape) == (2, len(tasks), 10, rows, columns), tuple(output.box_code.shape)

    def test_gradients_of_the_loss_reach_every_parameter(self) -> None:
        """Also those of the map that the head sees."""
        head, maps = self._head().train(), self._maps().requires_grad_()
        boxes = (self._boxes(), Boxes.empty())
        terms = head.loss(head(maps), head.targets(boxes), torch.tensor([True, True]))
        check_terms(terms, least=0).backward()  # type: ignore[no-untyped-call]
        check_gradients(head)
        assert maps.grad is not None, "no gradient reaches the map"
        assert float(maps.grad.abs().sum()) > 0, "no gradient reaches the map"

    def test_unlabelled_frames_add_nothing(self) -> None:
        """A frame without labels changes no loss of the others and gets no gradient, whatever the head says of it."""
        head, boxes = self._head().eval(), self._boxes()
        maps = self._maps().requires_grad_()
        both = head.loss(head(maps), head.targets((boxes, Boxes.empty())), torch.tensor([True, False]))
        alone = head.loss(head(maps[:1]), head.targets((boxes,)), torch.tensor([True]))
        for name, value in alone.items():
            close(both[name], value, name)
        check_terms(both).backward()  # type: ignore[no-untyped-call]
        assert maps.grad is not None
        assert float(maps.grad[1].abs().sum()) == 0, "the unlabelled frame gets a gradient"

    def test_a_batch_without_any_label_is_no_fault(self) -> None:
        """Its loss is zero, and still has a gradient to propagate."""
        head, maps = self._head(), self._maps().requires_grad_()
        targets = head.targets((Boxes.empty(), Boxes.empty()))
        total = check_terms(head.loss(head(maps), targets, torch.tensor([False, False])))
        assert float(total.detach()) == 0, "a loss without labels"
        if total.requires_grad:
            total.backward()  # type: ignore[no-untyped-call]
        assert maps.grad is None or float(maps.grad.abs().sum()) == 0

    def test_a_labelled_frame_without_boxes_teaches_that_there_is_nothing(self) -> None:
        """Empty is not missing: the loss is positive and finite."""
        head = self._head()
        terms = head.loss(head(self._maps(1)), head.targets((Boxes.empty(),)), torch.tensor([True]))
        assert float(check_terms(terms, least=0).detach()) > 0

    def test_boxes_outside_of_the_grid_are_left_out(self) -> None:
        """They change no target."""
        head, boxes = self._head(), self._boxes()
        away = Boxes(boxes.values.clone(), boxes.labels, boxes.scores)
        away.values[:, 0] += 1000.0
        mixed = Boxes(*(torch.cat(pair) for pair in zip(_fields(boxes), _fields(away), strict=True)))
        output, labelled = head(self._maps(1)), torch.tensor([True])
        with_them, without = (head.loss(output, head.targets((each,)), labelled) for each in (mixed, boxes))
        for name, value in without.items():
            close(with_them[name], value, name)

    def test_decoded_boxes_are_sound(self) -> None:
        """One set per frame: finite, with a size, a known label and a score in [0, 1], also of half-precision maps."""
        head = self._head().eval()
        with torch.autocast("cpu", torch.bfloat16):
            output = head(self._maps())
        frames = head.decode(output)
        assert len(frames) == 2
        for boxes in frames:
            assert boxes.values.dtype == torch.float32
            assert bool(boxes.values[:, :7].isfinite().all()), "a box that is not finite"
            assert bool((boxes.size > 0).all()), "a box without size"
            assert bool(((boxes.labels >= 0) & (boxes.labels < len(self.classes))).all()), "an unknown label"
            assert bool(((boxes.scores >= 0) & (boxes.scores <= 1)).all()), "a score outside [0, 1]"

    def test_a_head_that_is_trained_on_one_frame_finds_its_boxes(self) -> None:
        """Targets, loss and decoding belong together: after some steps the best boxes are the annotated ones."""
        head, maps, boxes = self._head().train(), self._maps(1), self._boxes()[:2]
        labelled, optimizer = torch.tensor([True]), torch.optim.Adam(head.parameters(), 0.01)
        for _ in range(self.steps):
            optimizer.zero_grad()
            terms = head.loss(head(maps), head.targets((boxes,)), labelled)
            check_terms(terms).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        found = head.decode(head(maps))[0]
        for values, label in zip(boxes.values, boxes.labels, strict=True):
            same = found[found.labels == label]
            assert len(same) > 0, f"no box of the class {self.classes[int(label)]}"
            best = same[same.scores.argmax()[None]] if int((boxes.labels == label).sum()) == 1 else same
            away = (best.center[:, :2] - values[:2]).norm(dim=1).min()
            assert float(away) < self.grid.cell_m / 2, f"the nearest box is {float(away):.2f} m away"

    steps = 150
    """Of that training."""


def _fields(boxes: Boxes) -> tuple[Tensor, ...]:
    return tuple(getattr(boxes, field.name) for field in dataclasses.fields(boxes))
