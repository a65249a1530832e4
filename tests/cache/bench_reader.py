"""Measures reading against its limit (pread + decompression) and zarr-python; not a test.

Run ``python -m tests.cache.bench_reader``: prints the table of docs/design/0002-cache.md.
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numcodecs.zstd import Zstd

from bevkd.cache.manifest import Header, TeacherIdentity
from bevkd.cache.reader import CacheReader
from bevkd.cache.shard import read_index, shard_name
from bevkd.cache.spec import CacheSpec
from bevkd.cache.writer import CacheWriter
from bevkd.data.identity import DatasetIdentity
from bevkd.grid import BEVGrid

SAMPLES, BLOCK, ROUNDS = 32, 16, 8
GRID = BEVGrid(x_m=(-51.2, 51.2), y_m=(-51.2, 51.2), cell_m=0.8)
SHAPES = {"bev_low": (256, 128, 128), "heatmap": (10, 128, 128)}


def sparse_sample(rng: np.random.Generator) -> dict[str, Any]:
    """Return a map with about four fifths zeros in patches, and smooth logits."""
    active = rng.random((16, 16)).repeat(8, 0).repeat(8, 1) < 0.35
    values = rng.gamma(1.5, 0.3, SHAPES["bev_low"]).astype(np.float32)
    bev = np.where(active & (rng.random(SHAPES["bev_low"]) < 0.55), values, 0).astype(np.float32)
    heatmap = (rng.normal(size=(10, 16, 16)).repeat(8, 1).repeat(8, 2) * 2 - 6).astype(np.float32)
    return {"bev_low": bev, "heatmap": heatmap + rng.normal(size=heatmap.shape).astype(np.float32) * 0.2}


def build(path: Path) -> tuple[CacheReader, float]:
    """Return a reader of a new cache and the CPU time of writing, in ms per sample."""
    rng = np.random.default_rng(0)
    signals = {"bev_low": {"encoding": "uint8"}, "heatmap": {"encoding": "logit8"}}
    header = Header(
        spec=CacheSpec.model_validate({"name": "bench", "block": BLOCK, "signals": signals}),
        teacher=TeacherIdentity(name="bench", architecture={}, weights_sha256="0" * 64),
        dataset=DatasetIdentity(name="bench", version="1", split="all", frames=SAMPLES, annotation_digest="0"),
        grid=GRID,
        classes=tuple(f"class-{index}" for index in range(10)),
        tokens=tuple(str(index) for index in range(SAMPLES)),
    )
    writer, spent = CacheWriter.open(path, header, SHAPES), 0.0
    for block in writer.pending():
        samples = [sparse_sample(rng) for _ in range(BLOCK)]
        start = time.process_time()
        writer.write_block(block, samples)
        spent += time.process_time() - start
    writer.seal()
    return CacheReader.open(path), spent / SAMPLES * 1e3


def readers(reader: CacheReader, name: str) -> dict[str, Callable[[int], object]]:
    """Return ways to read the array ``name`` of a sample."""
    array = next(array for array in reader.arrays([name]) if array.name == name)
    codec, buffer = Zstd(), np.empty(array.shape, array.dtype)
    handles, indices = [], []
    for block, record in enumerate(reader.manifest.records):
        path = reader.folder / shard_name(array, block)
        handles.append(os.open(path, os.O_RDONLY))
        indices.append(read_index(path, BLOCK, BLOCK, record.arrays[name].bytes).tolist())
    stored = zarr.open_group(reader.folder, mode="r")[name]

    def limit(sample: int) -> object:
        offset, size = indices[sample // BLOCK][sample % BLOCK]
        return codec.decode(os.pread(handles[sample // BLOCK], size, offset), out=buffer)

    return {
        "limit": limit,
        "bevkd, buffer": lambda sample: reader._read_sample(array, *divmod(sample, BLOCK), buffer),
        "bevkd, new array": lambda sample: reader._read_sample(
            array, *divmod(sample, BLOCK), np.empty(array.shape, array.dtype)
        ),
        "zarr-python": lambda sample: stored[sample],
    }


def main() -> None:
    """Print CPU ms per sample and the ratio to the limit, interleaved over all ways to read."""
    with tempfile.TemporaryDirectory() as folder:
        reader, writing = build(Path(folder) / "cache")
        lines = [f"writing both arrays: {writing:.1f} ms CPU per sample"]
        for name in SHAPES:
            ways, spent = readers(reader, name), {}
            for turn in range(ROUNDS):
                order = random.Random(turn).sample(range(SAMPLES), SAMPLES)
                for way, read in ways.items():
                    start = time.process_time()
                    for sample in order:
                        read(sample)
                    spent.setdefault(way, []).append((time.process_time() - start) / SAMPLES * 1e3)
            size = sum(record.arrays[name].bytes for record in reader.manifest.records) / SAMPLES / 1e6
            best = min(spent["limit"])
            lines += [f"{name} ({size:.3f} MB) {way}: {min(t):.3f} ms, {min(t) / best:.2f}" for way, t in spent.items()]
        sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
