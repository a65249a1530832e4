"""What a distillation loss has to hold."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from bevkd.cache.statistics import FEATURES, ChannelStatistics
from bevkd.config import parse
from bevkd.data.collate import Batch
from bevkd.distill.base import DistillContext, DistillLoss, DistillLossConfig, TeacherBatch
from bevkd.geometry.affine import BEVAffine
from bevkd.geometry.masks import STORED, in_views
from bevkd.geometry.sampling import points_of
from bevkd.models.detector import Detector, DetectorConfig, DetectorOutput, view_of
from bevkd.signals import MAPS, POINTS, SIGNALS
from bevkd.testing.frames import MadeUpFrames
from bevkd.testing.tools import batch_of, check_terms, close
from bevkd.types import Boxes, Instances, Signals, ViewInstances

CLASSES = ("car", "truck", "pedestrian")
UNMOVED = BEVAffine.identity()
CAMERAS = 2
STUDENT: dict[str, Any] = {
    "grid": {"x_m": [-12.8, 12.8], "y_m": [-12.8, 12.8], "z_m": [-5, 3], "cell_m": 1.6},
    "encoder": {
        "name": "lift_splat",
        "backbone": {
            "model_type": "resnet",
            "options": {
                "embedding_size": 16,
                "hidden_sizes": [16, 16],
                "depths": [1, 1],
                "layer_type": "basic",
                "out_features": ["stage1", "stage2"],
            },
        },
        "image_height": 32,
        "image_width": 64,
        "stride": 8,
        "neck_channels": 8,
        "channels": 8,
        "depth": {"start": 2.0, "stop": 14.0, "step": 2.0},
    },
    "bev_encoder": {"layers": [0], "strides": [1], "channels": [8], "up_channels": [8]},
    "head": {
        "name": "center",
        "channels": 8,
        "tasks": [["car", "truck"], ["pedestrian"]],
        "min_radius": 1,
        "nms": {"type": "circle", "squared_distance": [4, 1]},
    },
}


class DistillLossTests:
    """Subclass it and define :meth:`build`; the student is a tiny camera detector, the teacher is made up."""

    student_config: dict[str, Any] = STUDENT

    def build(self, context: DistillContext) -> tuple[DistillLossConfig, DistillLoss]:
        """Return the loss's config and the loss for ``context``."""
        raise NotImplementedError("define build()")

    def rebuild(self, config: DistillLossConfig, context: DistillContext) -> DistillLoss:
        """Return the loss of another config: what ``build`` in the module of its class makes of it."""
        loss: DistillLoss = importlib.import_module(type(config).__module__).build(config, context)
        return loss

    def _parts(
        self, weights: Mapping[str, float] = MappingProxyType({})
    ) -> tuple[DistillContext, DistillLossConfig, DistillLoss]:
        torch.manual_seed(0)
        student = Detector(parse(DetectorConfig, self.student_config, "the student"), CLASSES)
        shapes = {name: tuple(value.shape[1:]) for name, value in _teach(student).items()}
        shapes |= {name: (9, shapes[source][0]) for name, source in POINTS.items()}
        context = DistillContext(student, shapes, _statistics(shapes))
        config, loss = self.build(context)
        if weights:
            config = _weighted(config, weights)
            torch.manual_seed(0)
            loss = self.rebuild(config, context)
        assert config.misfits(context) == [], "a student with the teacher's shapes is refused"
        return context, config, loss

    def _batch(
        self, student: Detector, frames: tuple[int, ...], affine: BEVAffine, crowds: tuple[Boxes, ...] = ()
    ) -> Batch:
        source = MadeUpFrames(CLASSES, student.config.grid)
        batch = batch_of(source, view_of(student.config), [source.tokens[frame] for frame in frames])
        labelled = torch.ones_like(batch.labelled) if crowds else batch.labelled
        moved = tuple(affine.apply_to_boxes(boxes) for boxes in crowds or batch.boxes)
        return dataclasses.replace(batch, boxes=moved, labelled=labelled, affines=(affine,) * len(frames))

    def _teacher(
        self,
        student: Detector,
        config: DistillLossConfig,
        batch: Batch,
        empty: bool = False,
        crowds: tuple[Boxes, ...] = (),
    ) -> TeacherBatch:
        """Return a teacher that writes what the loss asks for, and nothing else."""
        wanted, grid = config.signals(), student.config.grid
        source = MadeUpFrames(CLASSES, grid)
        maps = _teach(student, len(batch))
        annotated = crowds or [source.annotations(token) for token in batch.tokens]
        held: dict[str, Any] = {name: maps[name] for name in MAPS if name in wanted}
        if "boxes" in wanted:
            held["boxes"] = tuple(Boxes.empty() if empty else boxes for boxes in annotated)
        seen = None
        if "instances" in wanted:
            nothing = in_views(Instances.empty(), torch.eye(3)[None], (1, 1))
            seen = tuple(nothing if empty else _view_instances(student, frame) for frame in range(len(batch)))
        for name in (name for name in POINTS if name in wanted):
            held[name] = tuple(
                points_of(maps[POINTS[name]][frame], boxes, grid) for frame, boxes in enumerate(annotated)
            )
        return TeacherBatch(Signals(**held), batch.affines, grid, seen)

    def _output(self, student: Detector, frames: int, dtype: torch.dtype = torch.float32) -> DetectorOutput:
        """Return maps of a student as leaves, so that their gradients can be looked at."""
        maps = {name: value.to(dtype).requires_grad_() for name, value in _teach(student, frames, seed=1).items()}
        head = type(student.head(torch.zeros(1, student.bev_encoder.out_channels, *student.config.grid.shape)))
        return DetectorOutput(
            maps["bev_low"],
            maps["bev_high"],
            head(maps["heatmap"], maps["box_code"]),
            image_features=maps["image_features"],
        )

    def _terms(
        self,
        frames: tuple[int, ...] = (0, 1, 2),
        affine: BEVAffine = UNMOVED,
        empty: bool = False,
        dtype: torch.dtype = torch.float32,
        spoilt: bool = False,
        weights: Mapping[str, float] = MappingProxyType({}),
        crowds: tuple[Boxes, ...] = (),
    ) -> tuple[dict[str, Tensor], DetectorOutput, DistillLoss]:
        context, config, loss = self._parts(weights)
        self._student = context.student
        batch = self._batch(context.student, frames, affine, crowds)
        output = self._output(context.student, len(frames), dtype)
        teacher = self._teacher(context.student, config, batch, empty, crowds)
        if spoilt:
            teacher = _SpoiltOutside(teacher.canonical, teacher.affines, teacher.grid, teacher.instances)
        before = [value.clone() for value in _tensors(teacher.canonical)]
        terms = loss(output, teacher, batch)
        for value, copy in zip(_tensors(teacher.canonical), before, strict=True):
            assert torch.equal(value.nan_to_num(), copy.nan_to_num()), "the loss changes what it reads"
        return terms, output, loss

    def test_it_says_what_it_reads(self) -> None:
        """``signals()`` names signals, each once."""
        _, config, _ = self._parts()
        names = config.signals()
        assert names, "it reads nothing"
        assert len(set(names)) == len(names), "a signal is named twice"
        assert set(names) <= set(SIGNALS), f"unknown signals {sorted(set(names) - set(SIGNALS))}"

    def test_gradients_reach_the_student(self) -> None:
        """Each term is one finite number, and their sum moves what the student says."""
        terms, output, loss = self._terms()
        check_terms(terms, least=0).backward()  # type: ignore[no-untyped-call]
        found = [value.grad for value in _leaves(output) if value.grad is not None]
        assert found, "no gradient reaches the student"
        assert all(bool(gradient.isfinite().all()) for gradient in found), "a gradient that is not finite"
        assert sum(float(gradient.abs().sum()) for gradient in found) > 0, "no gradient reaches the student"
        if isinstance(loss, nn.Module):
            for name, parameter in loss.named_parameters():
                assert parameter.grad is not None, f"no gradient reaches the loss's own {name}"

    def test_the_students_parameters_do_not_become_the_losses(self) -> None:
        """They would be trained twice, and saved with the loss."""
        context, _, loss = self._parts()
        own = {id(parameter) for parameter in loss.parameters()} if isinstance(loss, nn.Module) else set()
        assert own.isdisjoint(id(parameter) for parameter in context.student.parameters())

    def test_every_term_belongs_to_a_weight(self) -> None:
        """``weights`` names fields, and each term is called after one of them."""
        config = self._parts()[1]
        assert config.weights, "its Config does not say by which fields its terms are weighted: set weights"
        assert set(config.weights) <= set(type(config).model_fields), "weights names what is no field"
        terms = self._terms()[0]
        for name in terms:
            found = [weight for weight in config.weights if name == weight or name.startswith(f"{weight}_")]
            assert len(found) == 1, f"{name} is called after {len(found)} of {', '.join(config.weights)}, not after one"
        for weight in _in_use(config):
            assert any(config.weight_of(name) == weight for name in terms), f"no term is called after {weight}"

    def test_a_weight_of_zero_switches_its_terms_off(self) -> None:
        """They are not computed, and what only they read is not read."""
        config, terms = self._parts()[1], self._terms()[0]
        weights = _in_use(config)
        alone: set[str] = set()
        for weight in weights:
            rest = {name for name in terms if config.weight_of(name) != weight}
            off = _weighted(config, {weight: 0.0})
            assert set(off.signals()) <= set(config.signals()), f"{weight}: 0 reads more than before"
            if rest:
                left = set(self._terms(weights={weight: 0.0})[0])
                assert left == rest, f"{weight}: 0 leaves other terms than {sorted(rest)}"
                self._check_backward(weights={weight: 0.0})
            alone |= set(_weighted(config, {other: 0.0 for other in weights if other != weight}).signals())
        assert alone == set(config.signals()), "a signal is read that no term needs"
        assert not _weighted(config, dict.fromkeys(weights, 0.0)).signals(), "without terms it reads signals"

    def test_twice_the_weight_is_twice_the_terms(self) -> None:
        """And leaves the others as they are."""
        config = self._parts()[1]
        before = self._terms(weights={name: getattr(config, name) for name in _in_use(config)})[0]
        for weight in _in_use(config):
            after = self._terms(weights={weight: 2 * getattr(config, weight)})[0]
            for name, value in before.items():
                factor = 2 if config.weight_of(name) == weight else 1
                close(after[name], factor * value, f"{name} at twice {weight}")

    def test_it_is_a_function_of_its_arguments(self) -> None:
        """The same student, teacher and batch give the same terms."""
        first, second = self._terms()[0], self._terms()[0]
        assert {name: value.item() for name, value in first.items()} == {
            name: value.item() for name, value in second.items()
        }

    def test_augmented_frames_are_no_fault(self) -> None:
        """The teacher is un-augmented, the student is turned, scaled and mirrored."""
        terms = self._terms(affine=BEVAffine(flip_x=True, rotation_rad=0.4, scale=1.05))[0]
        check_terms(terms, least=0)

    def test_cells_that_the_teacher_does_not_cover_are_not_read(self) -> None:
        """Under a turn the corners of warped maps hold nothing: other values there change no term."""
        affine = BEVAffine(rotation_rad=0.6, scale=0.9, translation_m=(3.0, -2.0, 0.1))
        clean, spoilt = (self._terms(affine=affine, spoilt=each)[0] for each in (False, True))
        for name, value in clean.items():
            assert torch.equal(value, spoilt[name]), f"{name} reads cells that the mask of warped() leaves out"

    def _check_backward(self, **case: Any) -> None:
        """Check that terms and gradients are finite, and that they reach the student's output and the loss alone.

        Several processes train together only if every one of them has a gradient of each weight, objects or not.
        """
        terms, output, loss = self._terms(**case)
        total = check_terms(terms, least=0)
        own = list(loss.named_parameters()) if isinstance(loss, nn.Module) else []
        if total.requires_grad or any(parameter.requires_grad for _, parameter in own):
            total.backward()  # type: ignore[no-untyped-call]
        for value in _leaves(output):
            assert value.grad is None or bool(value.grad.isfinite().all()), "a gradient that is not finite"
        for name, parameter in own:
            if parameter.requires_grad:
                assert parameter.grad is not None, f"no gradient reaches the loss's own {name}"
                assert bool(parameter.grad.isfinite().all()), f"the gradient of the loss's own {name} is not finite"
        for name, parameter in self._student.named_parameters():
            assert parameter.grad is None, f"a gradient reaches the student's {name} beside its output"

    def test_frames_without_labels_or_boxes_are_no_fault(self) -> None:
        """A batch of one empty and one unlabelled frame gives finite terms that can be propagated."""
        self._check_backward(frames=(1, 2))
        self._check_backward(frames=(2,), empty=True)

    def test_a_teacher_that_finds_nothing_is_no_fault(self) -> None:
        """No box on any frame gives finite terms that can be propagated."""
        self._check_backward(empty=True)

    def test_any_number_of_boxes_is_no_fault(self) -> None:
        """One box; five hundred of which some lie outside of the grid; and both beside a frame that is empty."""
        self._check_backward(frames=(0,), crowds=(_crowd(1),))
        self._check_backward(crowds=(_crowd(500), Boxes.empty(), _crowd(1)))
        self._check_backward(crowds=(_crowd(500), Boxes.empty(), _crowd(1)), affine=BEVAffine(rotation_rad=0.4))

    def test_half_precision_maps_are_no_fault(self) -> None:
        """Losses run outside autocast: they widen what a student in half precision says."""
        for dtype in (torch.bfloat16, torch.float16):
            self._check_backward(dtype=dtype)
            self._check_backward(dtype=dtype, frames=(1, 2), empty=True)


def _in_use(config: DistillLossConfig) -> list[str]:
    """Return the weights that are not zero."""
    return [name for name in config.weights if getattr(config, name) > 0]


def _weighted(config: DistillLossConfig, weights: Mapping[str, float]) -> DistillLossConfig:
    """Return ``config`` with other weights."""
    return type(config).model_validate(config.model_dump() | dict(weights))


@dataclasses.dataclass(frozen=True)
class _SpoiltOutside(TeacherBatch):
    """A teacher whose warped maps hold nonsense where their mask is False."""

    def warped(self, name: str) -> tuple[Tensor, Bool[Tensor, "B 1 Y X"]]:
        values, covered = super().warped(name)
        assert not bool(covered.all())
        kept = covered[:, None] if values.ndim == 5 else covered
        return torch.where(kept, values, 1e3), covered


def _teach(student: Detector, frames: int = 1, seed: int = 0) -> dict[str, Tensor]:
    """Return maps with the shapes of the student's own."""
    chance = torch.Generator().manual_seed(seed)
    grid = student.config.grid.shape
    shapes = {
        "bev_low": (student.encoder.out_channels, *grid),
        "bev_high": (student.bev_encoder.out_channels, *grid),
        "heatmap": (len(student.classes), *grid),
        "box_code": (len(student.head.labels_of_task), 10, *grid),
    }
    maps = {name: torch.randn(frames, *shape, generator=chance) for name, shape in shapes.items()}
    view, stride = view_of(student.config), student.encoder.stride
    size = (view.image_height // stride, view.image_width // stride)
    features = torch.randn(frames, CAMERAS, student.encoder.image_channels, *size, generator=chance)
    return {**maps, "image_features": features}


def _statistics(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, ChannelStatistics]:
    """Return statistics of a teacher's features as a cache keeps them."""
    channels = {name: shape[1] if name in POINTS else shape[0] for name, shape in shapes.items() if name in FEATURES}
    return {
        name: ChannelStatistics(vectors=100, share=0.5, mean=(0.1,) * count, std=(1.5,) * count)
        for name, count in channels.items()
    }


def _crowd(count: int) -> Boxes:
    """Return boxes of all sizes and classes in and around the student's grid, with scores from 0 to 1."""
    chance = torch.Generator().manual_seed(count)
    drawn = torch.rand(count, 9, generator=chance)
    low = torch.tensor([-16.0, -16.0, -2.0, 0.4, 0.4, 0.5, -3.1, -5.0, -5.0])
    high = torch.tensor([16.0, 16.0, 1.0, 9.0, 3.0, 4.0, 3.1, 5.0, 5.0])
    labels = torch.randint(len(CLASSES), (count,), generator=chance)
    return Boxes(low + drawn * (high - low), labels, torch.rand(count, generator=chance))


def _view_instances(student: Detector, frame: int) -> ViewInstances:
    """Return two instances of a frame in the views of both cameras: discs in boxes of other shapes."""
    view = view_of(student.config)
    left, top = 4.0 + frame, 2.0 + frame
    boxes = torch.tensor(
        [[left, top, left + 9, top + 17], [left, top, view.image_width - 3.0, view.image_height - 2.0]]
    )
    across = torch.linspace(-1, 1, STORED)
    disc = across[:, None] ** 2 + across**2 < 1
    return ViewInstances(torch.arange(2), boxes, torch.tensor([0, 2]), torch.tensor([0.9, 0.5]), disc.expand(2, -1, -1))


def _leaves(output: DetectorOutput) -> list[Tensor]:
    assert output.image_features is not None
    return [output.bev_low, output.bev_high, output.head.heatmap, output.head.box_code, output.image_features]


def _tensors(signals: Signals) -> list[Tensor]:
    """Return all tensors that signals hold."""
    found: list[Tensor] = []
    for field in dataclasses.fields(signals):
        value = getattr(signals, field.name)
        for each in value if isinstance(value, tuple) else (value,):
            if isinstance(each, Tensor):
                found.append(each)
            elif dataclasses.is_dataclass(each):
                found += [part for part in vars(each).values() if isinstance(part, Tensor)]
    return found
