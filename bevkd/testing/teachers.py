"""What a teacher has to hold."""

from __future__ import annotations

import torch

from bevkd.cache.manifest import Header
from bevkd.cache.reader import CacheReader
from bevkd.cache.sample import stored_signals
from bevkd.cache.spec import CacheSpec
from bevkd.cache.writer import CacheWriter
from bevkd.data.collate import Batch
from bevkd.data.source import FrameSource
from bevkd.signals import MAPS
from bevkd.teachers.base import Teacher
from bevkd.testing.frames import MadeUpFrames
from bevkd.testing.tools import batch_of, close, same_boxes
from bevkd.types import Signals


class TeacherTests:
    """Subclass it and define :meth:`teacher`; :meth:`source` where made-up frames will not do."""

    def teacher(self) -> Teacher:
        """Return the teacher, built anew by every call, as small as it gets."""
        raise NotImplementedError("define teacher()")

    def source(self, teacher: Teacher) -> FrameSource:
        """Return a data set of three frames or more that the teacher can read."""
        return MadeUpFrames(teacher.classes, teacher.grid)

    def _batch(self, teacher: Teacher, *frames: int) -> Batch:
        source = self.source(teacher)
        return batch_of(source, teacher.view, [source.tokens[frame] for frame in frames])

    def _infer(self, teacher: Teacher, *frames: int) -> Signals:
        return teacher.infer(self._batch(teacher, *frames))

    def test_it_promises_signals_that_exist(self) -> None:
        """``shapes`` names maps with their shape per frame, and ``instances`` without one."""
        teacher = self.teacher()
        for name, shape in teacher.shapes.items():
            assert name in (*MAPS, "instances"), f"shapes names '{name}', the maps are {', '.join(MAPS)}"
            if name in MAPS:
                assert tuple(shape[-2:]) == teacher.grid.shape, f"{name} has the shape {shape} on {teacher.grid}"
        if "heatmap" in teacher.shapes:
            assert teacher.shapes["heatmap"][0] == len(teacher.classes), "heatmap needs a channel per class"

    def test_it_writes_what_it_promises(self) -> None:
        """Every map of ``shapes`` comes, in that shape, finite, and no other."""
        teacher = self.teacher()
        signals = self._infer(teacher, 0, 1)
        for name in MAPS:
            value = getattr(signals, name)
            if name not in teacher.shapes:
                assert value is None, f"{name} is written, but not promised in shapes"
                continue
            assert value is not None, f"{name} is promised in shapes, but not written"
            assert tuple(value.shape) == (2, *teacher.shapes[name]), f"{name} has the shape {tuple(value.shape)}"
            assert bool(value.isfinite().all()), f"{name} has values that are not finite"

    def test_every_frame_has_boxes_or_instances_of_known_classes(self) -> None:
        """Boxes are finite, have a size, a label of ``classes`` and a score in [0, 1]."""
        teacher = self.teacher()
        signals = self._infer(teacher, 0, 1, 2)
        assert signals.boxes is not None or "instances" in teacher.shapes, "no boxes"
        for boxes in signals.boxes or ():
            assert bool(boxes.values[:, :7].isfinite().all()), "a box that is not finite"
            assert bool((boxes.size > 0).all()), "a box without size"
            assert bool(((boxes.labels >= 0) & (boxes.labels < len(teacher.classes))).all()), "an unknown label"
            assert bool(((boxes.scores >= 0) & (boxes.scores <= 1)).all()), "a score outside [0, 1]"
        if "instances" in teacher.shapes:
            assert signals.instances is not None, "instances are promised in shapes, but not written"
        for per_frame in (signals.boxes, signals.instances):
            assert per_frame is None or len(per_frame) == 3, "one entry per frame"

    def test_it_is_in_eval_mode(self) -> None:
        """A second look at a batch gives the same, also after other batches, and nothing keeps a gradient."""
        teacher = self.teacher()
        first = self._infer(teacher, 0)
        self._infer(teacher, 1, 2)
        _same(first, self._infer(teacher, 0))
        for name in teacher.shapes:
            value = getattr(first, name)
            assert not (isinstance(value, torch.Tensor) and value.requires_grad), f"{name} keeps a gradient"

    def test_a_frame_does_not_depend_on_its_batch(self) -> None:
        """The frames beside it change a frame's signals by no more than rounding."""
        teacher = self.teacher()
        together, alone = self._infer(teacher, 1, 2, 0), self._infer(teacher, 0)
        _same_maps(together, alone, 2)

    def test_it_can_be_built_again(self) -> None:
        """Two teachers of one config are the same, in what they say they are and in what they write."""
        first, second = self.teacher(), self.teacher()
        assert first.identity == second.identity
        _same(self._infer(first, 0), self._infer(second, 0))

    def test_its_signals_can_be_cached(self, tmp_path: object) -> None:
        """A cache of all that it promises is written and read, boxes bit by bit."""
        teacher = self.teacher()
        source = self.source(teacher)
        wanted = {name: {"encoding": "float16", "max_error": 0.1} for name in teacher.shapes if name in MAPS}
        signals = self._infer(teacher, 0, 1)
        if signals.boxes is not None:
            wanted["boxes"] = {"encoding": "boxes", "capacity": 10_000, "min_score": 0.0}
        if signals.instances is not None:
            wanted["instances"] = {"encoding": "masks", "max_error": 1.0, "min_score": 0.0}
        header = Header(
            spec=CacheSpec.model_validate({"name": "all", "signals": wanted}),
            teacher=teacher.identity,
            dataset=source.identity,
            grid=teacher.grid,
            classes=teacher.classes,
            tokens=source.tokens[:2],
        )
        writer = CacheWriter.open(f"{tmp_path}/cache", header, dict(teacher.shapes))
        nothing = [None, None]
        writer.write_block(0, [stored_signals(signals, nothing, header.spec, header.grid, index) for index in (0, 1)])
        writer.seal()
        reader = CacheReader.open(f"{tmp_path}/cache")
        for index, boxes in enumerate(signals.boxes or ()):
            same_boxes(reader.boxes(source.tokens[index]), boxes.to("cpu"))


def _same(first: Signals, second: Signals) -> None:
    """Check that two looks at one frame agree."""
    _same_maps(first, second, 0)
    for boxes, others in zip(first.boxes or (), second.boxes or (), strict=True):
        same_boxes(boxes, others)


def _same_maps(signals: Signals, alone: Signals, frame: int) -> None:
    """Check that ``frame`` of some signals is the only frame of others."""
    for name in MAPS:
        value, other = getattr(signals, name), getattr(alone, name)
        assert (value is None) == (other is None), f"{name} is written for some batches only"
        if value is not None:
            close(value[frame], other[0], name)
