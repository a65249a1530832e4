"""What a data set has to hold."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from multiprocessing.reduction import ForkingPickler

import torch
from torch import Tensor

from bevkd.data.images import ImageView
from bevkd.data.source import FrameSource, Sensor
from bevkd.errors import DataError
from bevkd.geometry.boxes import points_in_boxes
from bevkd.types import Boxes, Frame

LOOKED_AT = 3
"""Frames that each test loads."""


class FrameSourceTests:
    """Subclass it and define :meth:`source` and :attr:`sensors`."""

    sensors: frozenset[Sensor] = frozenset({"lidar"})
    """All that the data set has."""

    def source(self) -> FrameSource:
        """Return the data set; a few frames are enough, of which one has boxes that LiDAR returns fall into."""
        raise NotImplementedError("define source()")

    def _frames(self, source: FrameSource, sensors: frozenset[Sensor] | None = None) -> list[Frame]:
        wanted = self.sensors if sensors is None else sensors
        views = _views(source, source.tokens[0]) if "camera" in wanted else None
        return [source.load(token, wanted, views) for token in source.tokens[:LOOKED_AT]]

    def test_it_says_what_it_is(self) -> None:
        """Tokens are unique, annotated ones are among them, labelled ones among these, and the identity counts them."""
        source = self.source()
        assert source.tokens, "no frames"
        assert len(set(source.tokens)) == len(source.tokens), "a token is repeated"
        assert source.annotated <= set(source.tokens), "annotated frames that are not among the tokens"
        assert source.labelled <= source.annotated, "labelled frames that are not annotated"
        assert source.classes, "no classes"
        assert len(set(source.classes)) == len(source.classes), "a class is repeated"
        assert source.identity.frames == len(source.tokens), "identity.frames is another number"
        assert self.source().identity == source.identity, "a second look gives another identity"

    def test_its_metrics_exist(self) -> None:
        """``metrics`` names a module that can score detections, or is None."""
        name = self.source().metrics
        if name is not None:
            module = importlib.import_module(name if "." in name else f"bevkd.evaluation.{name}")
            for function in ("evaluate", "load_detections", "save_detections", "to_boxes"):
                assert hasattr(module, function), f"{name} has no {function}"

    def test_a_frame_holds_the_sensors_that_were_asked_for(self) -> None:
        """And no other."""
        source = self.source()
        for sensor in sorted(self.sensors & {"lidar", "camera", "radar"}):
            frame = self._frames(source, frozenset({sensor}))[0]
            held = {"lidar": frame.points, "camera": frame.images, "radar": frame.radar}
            assert {name for name, value in held.items() if value is not None} == {sensor}
            assert (frame.rig is not None) == (sensor == "camera"), "the rig comes with the images"
        for frame in self._frames(source, frozenset()):
            assert frame.points is None
            assert frame.images is None
            assert frame.radar is None

    def test_points_are_in_the_units_of_frames(self) -> None:
        """LiDAR: x, y, z in metres, intensity, lag in seconds; radar: with velocity and cross section; float32."""
        for frame in self._frames(self.source()):
            for name, values, columns in (("points", frame.points, 5), ("radar", frame.radar, 7)):
                if values is None:
                    continue
                assert values.dtype == torch.float32, f"{name} are {values.dtype}"
                assert values.shape[1] == columns, f"{name} have {values.shape[1]} columns"
                assert bool(values.isfinite().all()), f"{name} are not all finite"
                assert bool((values[:, :3].abs() < 1000).all()), f"{name} are further away than a kilometre"
                earliest = 0.0 if name == "points" else -1.0  # a radar may scan after the LiDAR
                lags = (values[:, -1] >= earliest) & (values[:, -1] < 10)
                assert bool(lags.all()), f"{name} have lags that are no seconds"

    def test_images_are_the_views_that_were_asked_for(self) -> None:
        """Their size is the view's, the rig is theirs, and intrinsics follow the view."""
        if "camera" not in self.sensors:
            return
        source = self.source()
        token, sizes = source.tokens[0], source.image_sizes(source.tokens[0])
        views = _views(source, token)
        frame = source.load(token, frozenset({"camera"}), views)
        whole = source.load(token, frozenset({"camera"}), {name: _whole(size) for name, size in sizes.items()})
        for images, rig in ((frame.images, frame.rig), (whole.images, whole.rig)):
            assert images is not None
            assert rig is not None
            assert rig.names == tuple(sizes), "the rig's cameras are not those of image_sizes, in that order"
            assert images.dtype == torch.uint8
        assert frame.images is not None
        assert frame.rig is not None
        assert whole.rig is not None
        for index, view in enumerate(views.values()):
            assert tuple(frame.images[index].shape) == (3, view.height, view.width)
            expected = view.matrix() @ whole.rig.intrinsics[index]
            torch.testing.assert_close(frame.rig.intrinsics[index], expected, rtol=1e-4, atol=1e-2)
        for pose in frame.rig.lidar_from_camera:
            _check_pose(pose)

    def test_boxes_are_those_of_labelled_frames(self) -> None:
        """None without labels; finite, with a size and a known label otherwise."""
        source = self.source()
        for frame in self._frames(source, frozenset()):
            if frame.token not in source.labelled:
                assert frame.boxes is None, "boxes of a frame that is not labelled"
            if frame.token not in source.annotated:
                continue
            boxes = source.annotations(frame.token)
            _check_boxes(boxes, len(source.classes))
            if frame.token not in source.labelled:
                continue
            assert frame.boxes is not None, "no boxes of a labelled frame: empty is not missing"
            assert torch.equal(frame.boxes.pack().nan_to_num(), boxes.pack().nan_to_num())

    def test_returns_fall_into_boxes(self) -> None:
        """Points and boxes are in the same frame: of some frame's boxes at least a third hold a return."""
        if "lidar" not in self.sensors:
            return
        source = self.source()
        shares = []
        for frame in self._frames(source, frozenset({"lidar"})):
            if frame.token not in source.annotated:
                continue
            boxes = source.annotations(frame.token)
            if frame.points is not None and len(boxes):
                hit = points_in_boxes(frame.points[:, :3], boxes.values[:, :7]).any(dim=1)
                shares.append(float(hit.float().mean()))
        assert not shares or max(shares) >= 1 / 3, "boxes are empty: they are in another frame, or have other sizes"

    def test_a_frame_can_be_loaded_again_and_elsewhere(self) -> None:
        """A pickled source, as loader workers get it, gives the same frames."""
        source = self.source()
        copy: FrameSource = ForkingPickler.loads(ForkingPickler.dumps(source))
        assert copy.tokens == source.tokens
        for frame, again, other in zip(self._frames(source), self._frames(source), self._frames(copy), strict=True):
            for name in ("points", "images", "radar"):
                first = getattr(frame, name)
                for second in (getattr(again, name), getattr(other, name)):
                    assert (first is None) == (second is None)
                    assert first is None or torch.equal(first, second), f"{name} differ"

    def test_a_pose_is_a_rigid_motion(self) -> None:
        """In float64: map coordinates are too large for less."""
        source = self.source()
        pose = source.global_from_lidar(source.tokens[0])
        assert pose.dtype == torch.float64
        _check_pose(pose)

    def test_files_that_are_there_have_no_fault(self) -> None:
        """``check`` is asked before the work starts."""
        source = self.source()
        assert list(source.check(source.tokens[:LOOKED_AT], self.sensors)) == []

    def test_an_unknown_token_is_refused(self) -> None:
        """With an error that is meant for the user."""
        source = self.source()
        try:
            source.load("no such token", frozenset())
            source.annotations("no such token")
        except DataError:
            return
        raise AssertionError("an unknown token gives no DataError")


def _views(source: FrameSource, token: str) -> Mapping[str, ImageView]:
    """Return a view of each camera that shrinks it and cuts off its top."""
    return {name: ImageView.cover(size, 32, 64) for name, size in source.image_sizes(token).items()}


def _whole(size: tuple[int, int]) -> ImageView:
    return ImageView(*size, scale=1.0)


def _check_boxes(boxes: Boxes, classes: int) -> None:
    assert bool(boxes.values[:, :7].isfinite().all()), "a box that is not finite"
    assert bool((boxes.size > 0).all()), "a box without size"
    assert bool((boxes.values[:, :3].abs() < 1000).all()), "a box further away than a kilometre: in another frame?"
    assert bool(((boxes.labels >= 0) & (boxes.labels < classes)).all()), "an unknown label"
    assert bool((boxes.scores == 1).all()), "annotations have the score 1"


def _check_pose(pose: Tensor) -> None:
    turn = pose[:3, :3].double()
    torch.testing.assert_close(turn @ turn.T, torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-4)
    assert float(torch.linalg.det(turn)) > 0, "a pose that mirrors"
    assert pose[3].tolist() == [0.0, 0.0, 0.0, 1.0]
