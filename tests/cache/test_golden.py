"""Caches written by earlier versions stay readable: ``golden/v1`` was written once and is never rewritten.

``python -m tests.cache.test_golden FOLDER`` writes a new one, for a new schema version only.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bevkd.cache.reader import CacheReader
from bevkd.cache.verify import verify
from bevkd.cache.writer import CacheWriter
from bevkd.types import Boxes
from tests.cache import kit

GOLDEN = Path(__file__).parent / "golden"
SHAPES = {"bev_low": (2, 3, 4), "bev_high": (2, 3, 4), "heatmap": (3, 3, 4), "box_code": (1, 10, 3, 4)}
NAME = "e986101716dfe1f4a70c17cb2ca3fe131764e49b26237a80e5334c32e3de8d28"
DECODED = {
    "bev_high": "efd0e1048a93e1778689e894bb4e9930619298c0ec69bd9c44d1a25063261d79",
    "bev_low": "7f34d20926ac776e64979881815c4ae9c3babeb6e2e6263982b0f253c2c2437b",
    "box_code": "9070677d1c4a20042d3a3cdd5e8280f64d3133cc7ae22a05c549905cba6c4d11",
    "heatmap": "d8c5523089fe48a8b8919f628d8f82497eaa2106eba0716507043f5b48e9d00f",
}


def wave(shape: tuple[int, ...], phase: float) -> Any:
    return np.sin(0.7 * np.arange(np.prod(shape)) + phase).astype(np.float32).reshape(shape)


def sample(index: int) -> dict[str, Any]:
    """Return sample ``index``: waves, and ``index`` boxes."""
    maps = {name: wave(shape, index + place) for place, (name, shape) in enumerate(sorted(SHAPES.items()))}
    maps["bev_low"] = np.maximum(maps["bev_low"], 0)
    maps["heatmap"] = maps["heatmap"] * 8 - 2
    values = torch.from_numpy(wave((index, 9), 0.1))
    return {**maps, "boxes": Boxes(values, torch.arange(index), torch.linspace(0.9, 0.5, index))}


def write(folder: Path) -> None:
    """Write the golden cache."""
    grid = {"x_m": (0, 4), "y_m": (0, 3), "cell_m": 1.0}
    writer = CacheWriter.open(folder, kit.header(3, block=2, grid=grid), SHAPES)
    for block, indices in enumerate([[0, 1], [2]]):
        writer.write_block(block, [sample(index) for index in indices])
    writer.seal()


def test_a_cache_of_schema_version_1_can_be_read() -> None:
    reader = CacheReader.open(GOLDEN / "v1")
    assert reader.manifest.name == NAME
    assert verify(GOLDEN / "v1", deep=True) == []


@pytest.mark.parametrize("signal", sorted(SHAPES))
def test_its_maps_decode_to_the_same_bits(signal: str) -> None:
    reader = CacheReader.open(GOLDEN / "v1")
    data = b"".join(reader.signal(token, signal).numpy().tobytes() for token in reader.tokens)
    assert hashlib.sha256(data).hexdigest() == DECODED[signal]


def test_its_values_are_the_ones_that_were_written() -> None:
    reader = CacheReader.open(GOLDEN / "v1")
    for index, token in enumerate(reader.tokens):
        wanted = sample(index)
        for signal, tolerance in (("bev_low", 0.005), ("bev_high", 0.01), ("box_code", 1e-3)):
            assert np.abs(reader.signal(token, signal).numpy() - wanted[signal]).max() < tolerance
        seen = wanted["heatmap"] > -6.9
        assert np.abs(reader.signal(token, "heatmap").numpy() - wanted["heatmap"])[seen].max() < 0.04
        boxes = reader.signal(token, "boxes")
        assert torch.allclose(boxes.values, wanted["boxes"].values)
        assert boxes.labels.tolist() == list(range(index))


if __name__ == "__main__":
    write(Path(sys.argv[1]))
