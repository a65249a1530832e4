"""A small cache for the tests of ``bevkd.cache``: header, samples, and writers that run in child processes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from bevkd.cache.manifest import Header, Manifest, TeacherIdentity
from bevkd.cache.reader import CacheReader
from bevkd.cache.spec import CacheSpec
from bevkd.cache.writer import CacheWriter
from bevkd.data.identity import DatasetIdentity
from bevkd.grid import BEVGrid
from bevkd.types import Boxes

GRID = BEVGrid(x_m=(-6, 6), y_m=(-4, 4), cell_m=1.0)
CLASSES = ("car", "truck", "pedestrian")
SHAPES = {"bev_low": (4, 8, 12), "bev_high": (5, 8, 12), "heatmap": (3, 8, 12), "box_code": (2, 10, 8, 12)}
SIGNALS = {
    "bev_low": {"encoding": "uint8"},
    "bev_high": {"encoding": "int8"},
    "heatmap": {"encoding": "logit8"},
    "box_code": {"encoding": "float16"},
    "boxes": {"encoding": "boxes", "capacity": 6},
}
TEACHER = TeacherIdentity(
    name="formula", architecture={"depth": 2}, weights_sha256="0" * 64, preprocessing={"sweeps": 1}
)


def header(samples: int = 11, block: int = 4, signals: dict[str, Any] | None = None, **changes: Any) -> Header:
    """Return a header of ``samples`` samples; versions are fixed, so that its bytes are."""
    values: dict[str, Any] = {
        "spec": CacheSpec.model_validate({"name": "test", "block": block, "signals": signals or SIGNALS}),
        "teacher": TEACHER,
        "dataset": DatasetIdentity(name="world", version="1", split="train", frames=samples, annotation_digest="a1"),
        "grid": GRID,
        "classes": CLASSES,
        "tokens": tuple(f"token-{index:03d}" for index in range(samples)),
        "config": {"seed": 1, "rates": [0.5, 1]},
        "licence": "CC0",
        "versions": {"bevkd": "test"},
    }
    return Header(**(values | changes))


def sample(token: str) -> dict[str, Any]:
    """Return the signals of a sample: a function of its token; maps are numpy arrays, which the writer takes too."""
    rng = np.random.default_rng(int(hashlib.sha256(token.encode()).hexdigest()[:8], 16))
    maps = {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
    maps["bev_low"] = np.maximum(maps["bev_low"], 0)
    count = int(rng.integers(0, 5))
    values = torch.from_numpy(rng.normal(size=(count, 9)).astype(np.float32))
    labels = torch.from_numpy(rng.integers(0, len(CLASSES), count))
    scores = torch.from_numpy(rng.uniform(0.1, 1, count).astype(np.float32))
    return {**maps, "boxes": Boxes(values, labels, scores)}


def samples(tokens: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Return the samples of ``tokens``, one by one."""
    return (sample(token) for token in tokens)


def write(path: Path, described: Header, order: int = 1) -> Manifest:
    """Write and seal a cache, its blocks forwards (``order`` 1) or backwards (-1)."""
    writer = CacheWriter.open(path, described, SHAPES)
    for block in writer.pending()[::order]:
        writer.write_block(block, samples(described.block_tokens(block)))
    return writer.seal()


def tree(path: Path) -> dict[str, bytes]:
    """Return the content of all files under ``path``."""
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def nothing() -> None:
    """Do nothing."""


DIED = 77


def write_and_die(path: Path, described: Header, call: str, count: int) -> None:
    """Write a cache, but end the process without any clean-up at the ``count``-th call of ``os.<call>``."""
    before, left = getattr(os, call), [count]

    def dying(*arguments: Any, **keywords: Any) -> Any:
        if left[0] == 0:
            os._exit(DIED)
        left[0] -= 1
        return before(*arguments, **keywords)

    setattr(os, call, dying)
    write(path, described)


class CachedMaps(Dataset[torch.Tensor]):
    """The map ``bev_low`` of a cache, for loader workers."""

    def __init__(self, reader: CacheReader) -> None:
        self.reader = reader

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> torch.Tensor:
        value = self.reader.signal(self.reader.tokens[index], "bev_low")
        assert isinstance(value, torch.Tensor)
        return value
