"""The code of the how-tos runs as it stands."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from bevkd.cache.reader import CacheReader
from bevkd.config import parse
from bevkd.grid import BEVGrid
from bevkd.progress import Silent
from bevkd.testing import MadeUpFrames
from pipeline.cache_teacher import cache_teacher
from pipeline.recipe import CacheRecipe
from tests.cache import kit

HOW_TO = Path(__file__).parents[2] / "docs" / "how-to"
CLASSES = ["car", "pedestrian"]


def python(page: str) -> list[tuple[str, str]]:
    """Return title ('' without one) and code of each Python block of a page."""
    text = (HOW_TO / f"{page}.md").read_text(encoding="utf-8")
    return re.findall(r"```python(?: title=\"(.*?)\")?\n(.*?)```", text, re.DOTALL)


def write(folder: Path) -> None:
    """Write the modules of the how-tos about plug-ins, and their tests."""
    for page in ("own-data", "own-teacher", "own-loss"):
        for title, code in python(page):
            (folder / title).parent.mkdir(exist_ok=True)
            (folder / title).write_text(code)


@pytest.fixture
def plug_ins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Install the data set and the teacher of the how-tos as another distribution would."""
    write(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    points = {
        "bevkd.data.sources": EntryPoint("folder", "my_bev.folder", "bevkd.data.sources"),
        "bevkd.teachers": EntryPoint("exported", "my_bev.exported", "bevkd.teachers"),
    }
    installed = importlib.metadata.entry_points

    def entry_points(**selection: Any) -> Any:
        group = selection.get("group")
        return [points[group]] if group in points else installed(**selection)

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)


@pytest.mark.usefixtures("plug_ins")
def test_ones_own_data_and_ones_own_teacher_make_a_cache(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    boxes = {}
    (tmp_path / "data").mkdir()
    for index in range(5):
        values, labels = rng.normal(size=(3, 9)).astype(np.float32), rng.integers(0, 2, 3)
        points = rng.normal(size=(10, 5)).astype(np.float32)
        np.savez(tmp_path / "data" / f"frame-{index}.npz", points=points, boxes=values, labels=labels)
        scores = rng.uniform(0.5, 1, (3, 1)).astype(np.float32)
        boxes[f"frame-{index}"] = torch.from_numpy(np.concatenate([values, scores, labels[:, None]], 1)).float()
    save_file(boxes, tmp_path / "boxes.safetensors")
    recipe = {
        "data": {"name": "folder", "root": str(tmp_path / "data"), "classes": CLASSES},
        "teacher": {
            "name": "exported",
            "file": str(tmp_path / "boxes.safetensors"),
            "grid": {"x_m": [-8, 8], "y_m": [-8, 8], "cell_m": 1.0},
            "origin": "somebody's detector",
        },
        "spec": "boxes",
    }
    cache_teacher(parse(CacheRecipe, recipe, "the recipe"), str(tmp_path / "cache"), limit=None, progress=Silent())
    reader = CacheReader.open(tmp_path / "cache")
    assert reader.tokens == tuple(boxes)
    assert torch.equal(reader.boxes("frame-3").pack(), boxes["frame-3"])


def test_the_plug_ins_pass_their_suites(tmp_path: Path) -> None:
    write(tmp_path)
    source = MadeUpFrames(("car", "pedestrian"), BEVGrid(x_m=(-16, 16), y_m=(-16, 16), cell_m=1.0))
    (tmp_path / "frames").mkdir()
    for token in source.tokens:
        points, boxes = source.load(token, frozenset({"lidar"})).points, source.annotations(token)
        assert points is not None
        np.savez(tmp_path / "frames" / f"{token}.npz", points=points, boxes=boxes.values, labels=boxes.labels)
    command = [sys.executable, "-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider", "tests"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stdout
    (passed,) = re.findall(r"^(\d+) passed", done.stdout, re.MULTILINE)
    assert int(passed) > 20


def test_a_cache_is_read_as_the_how_to_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kit.write(tmp_path / "caches" / "centerpoint", kit.header())
    monkeypatch.chdir(tmp_path)
    ((_, code),) = python("share-a-cache")
    exec(compile(code, "share-a-cache.md", "exec"), {})


def test_the_instance_head_is_used_as_the_how_to_says() -> None:
    ((_, code),) = python("segmentation")
    names: dict[str, Any] = {}
    exec(compile(code, "segmentation.md", "exec"), names)
    assert set(names["losses"]) == {"heatmap", "box", "mask"}
    assert float(names["loss"].detach()) > 0
