"""Worlds that the tests of bevkd.world share: small ones, written once."""

from __future__ import annotations

from pathlib import Path

import pytest
from nuscenes import NuScenes

from bevkd.world import VERSION_FOLDER, WorldConfig, world_preset, write_world


@pytest.fixture(scope="session")
def config() -> WorldConfig:
    return world_preset("tiny")


@pytest.fixture(scope="session")
def world(config: WorldConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(config, tmp_path_factory.mktemp("world") / "tiny", workers=1)


@pytest.fixture(scope="session")
def nusc(world: Path) -> NuScenes:
    return NuScenes(VERSION_FOLDER, str(world), verbose=False)


@pytest.fixture(scope="session")
def hills_config() -> WorldConfig:
    return world_preset(
        "hills",
        scenes=2,
        keyframes_per_scene=2,
        image_height=64,
        image_width=176,
        lidar_azimuths=180,
        sweeps_per_keyframe=0,
    )


@pytest.fixture(scope="session")
def hills(hills_config: WorldConfig, tmp_path_factory: pytest.TempPathFactory) -> NuScenes:
    folder = write_world(hills_config, tmp_path_factory.mktemp("world") / "hills", workers=1)
    return NuScenes(VERSION_FOLDER, str(folder), verbose=False)
