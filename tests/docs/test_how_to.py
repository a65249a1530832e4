"""The code of the how-tos runs as it stands."""

from __future__ import annotations

import importlib.metadata
import re
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from bevkd.cache.reader import CacheReader
from bevkd.config import parse
from bevkd.progress import Silent
from pipeline.cache_teacher import cache_teacher
from pipeline.recipe import CacheRecipe
from tests.cache import kit

HOW_TO = Path(__file__).parents[2] / "docs" / "how-to"
CLASSES = ["car", "pedestrian"]


def python(page: str) -> list[tuple[str, str]]:
    """Return title ('' without one) and code of each Python block of a page."""
    text = (HOW_TO / f"{page}.md").read_text(encoding="utf-8")
    return re.findall(r"```python(?: title=\"(.*?)\")?\n(.*?)```", text, re.DOTALL)


@pytest.fixture
def plug_ins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Install the data set and the teacher of the how-tos as another distribution would."""
    for page in ("own-data", "own-teacher"):
        ((title, code),) = python(page)
        path = tmp_path / title
        path.parent.mkdir(exist_ok=True)
        path.write_text(code)
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


def test_a_cache_is_read_as_the_how_to_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kit.write(tmp_path / "caches" / "centerpoint", kit.header())
    monkeypatch.chdir(tmp_path)
    ((_, code),) = python("share-a-cache")
    exec(compile(code, "share-a-cache.md", "exec"), {})
