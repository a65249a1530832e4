"""Every plug-in in the folders holds what its suite in ``bevkd.testing`` says."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bevkd import registry, testing
from bevkd.config import parse
from bevkd.data.join import View
from bevkd.data.source import FrameSource
from bevkd.distill.base import DistillContext, DistillLoss, DistillLossConfig
from bevkd.progress import Silent
from bevkd.teachers.base import Teacher
from pipeline.world import make_world
from tests.conformance import cases

PACKAGES = {
    "bevkd.models.encoders": cases.ENCODERS,
    "bevkd.models.heads": cases.HEADS,
    "bevkd.teachers": cases.TEACHERS,
    "bevkd.distill": cases.LOSSES,
    "bevkd.data.sources": cases.SOURCES,
}


@pytest.mark.parametrize("package", PACKAGES)
def test_every_plug_in_has_a_case(package: str) -> None:
    """A plug-in in the folder without an entry in ``cases.py`` is one that nothing checks."""
    assert sorted(PACKAGES[package]) == registry.names(package)


def both(package: str, table: Collection[str]) -> list[str]:
    """Return the plug-ins that are in the folder and in the table; the test above speaks for the others."""
    return [name for name in registry.names(package) if name in table]


def load(package: str, name: str, values: dict[str, Any]) -> tuple[Any, Any]:
    """Return the module of a plug-in and its config."""
    module = registry.load(package, name)
    return module, parse(module.Config, {"name": name, **values}, f"the case of {name}")


class TestEncoders(testing.EncoderTests):
    @pytest.fixture(autouse=True, params=both("bevkd.models.encoders", cases.ENCODERS))
    def plug_in(self, request: pytest.FixtureRequest) -> None:
        self.module, self.config = load("bevkd.models.encoders", request.param, cases.ENCODERS[request.param])
        height, width = getattr(self.config, "image_height", 0), getattr(self.config, "image_width", 0)
        self.view = View(self.config.sensors, height, width)

    def encoder(self) -> nn.Module:
        built: nn.Module = self.module.build(self.config, self.grid)
        return built


class TestHeads(testing.HeadTests):
    @pytest.fixture(autouse=True, params=both("bevkd.models.heads", cases.HEADS))
    def plug_in(self, request: pytest.FixtureRequest) -> None:
        self.name = request.param

    def head(self, in_channels: int) -> Any:
        module, config = load("bevkd.models.heads", self.name, cases.HEADS[self.name])
        return module.build(config, in_channels, self.grid, self.classes)


class TestTeachers(testing.TeacherTests):
    @pytest.fixture(autouse=True, params=both("bevkd.teachers", cases.TEACHERS))
    def plug_in(self, request: pytest.FixtureRequest, tmp_path: Path) -> None:
        (folder := tmp_path / "teacher").mkdir()
        values = cases.TEACHERS[request.param](folder)
        self.module, self.config = load("bevkd.teachers", request.param, values)

    def teacher(self) -> Teacher:
        built: Teacher = self.module.build(self.config, cases.CLASSES, torch.device("cpu"))
        return built


LOSS_CASES = [(name, index) for name in both("bevkd.distill", cases.LOSSES) for index in range(len(cases.LOSSES[name]))]


class TestDistillLosses(testing.DistillLossTests):
    @pytest.fixture(autouse=True, params=LOSS_CASES, ids=[f"{name}-{index}" for name, index in LOSS_CASES])
    def plug_in(self, request: pytest.FixtureRequest) -> None:
        self.name, self.index = request.param

    def build(self, context: DistillContext) -> tuple[DistillLossConfig, DistillLoss]:
        module, config = load("bevkd.distill", self.name, cases.LOSSES[self.name][self.index])
        return config, module.build(config, context)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a generated world of a few frames."""
    root = tmp_path_factory.mktemp("conformance") / "world"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        make_world(root, "tiny", None, 0, Silent())
    return root


class TestFrameSources(testing.FrameSourceTests):
    @pytest.fixture(autouse=True, params=both("bevkd.data.sources", cases.SOURCES))
    def plug_in(self, request: pytest.FixtureRequest, world: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
        case = cases.SOURCES[request.param]
        config = case.config(world, _real_data(request))
        if config is None:
            pytest.skip("no real sensor data; set BEVKD_REAL_DATA to run this test")
        self.name, self.sensors = request.param, case.sensors
        index_dir = str(tmp_path_factory.getbasetemp() / "index")
        indexed = "index_dir" in registry.load("bevkd.data.sources", self.name).Config.model_fields
        self.config = config | ({"index_dir": index_dir} if indexed else {})
        if "sources" in config:
            self.config["sources"] = [{**each, "index_dir": index_dir} for each in config["sources"]]

    def source(self) -> FrameSource:
        module, config = load("bevkd.data.sources", self.name, self.config)
        built: FrameSource = module.build(config, self.sensors)
        return built


def _real_data(request: pytest.FixtureRequest) -> Path | None:
    try:
        folder: Path = request.getfixturevalue("real_data")
    except pytest.skip.Exception:
        return None
    return folder


class TestMadeUpFrames(testing.FrameSourceTests):
    """The made-up frames that the other suites take are held to the same."""

    sensors = frozenset({"lidar", "camera", "radar", "lidar_depth"})

    def source(self) -> FrameSource:
        return testing.MadeUpFrames(cases.CLASSES, testing.EncoderTests.grid)
