"""The benchmarks measure what they say, on samples small enough for a test."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from bevkd.cache.reader import CacheReader
from bevkd.errors import ConfigError
from bevkd.progress import Silent
from pipeline.bench import opening, peers, reads
from pipeline.bench.store import SECTIONS, BenchSettings, bench_store, result_tables
from pipeline.recipe import load_cache
from tests.pipeline import kit

KEYS = {
    "read_cpu_over_limit", "peers", "bytes_per_frame", "fp32_over_stored", "gradient_cosine", "stage1_over_forward",
    "dask_speedup_2", "s3_requests_per_read", "open_seconds",
}  # fmt: skip
"""What the benchmark's JSON promises."""


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reads, "SAMPLES", 6)
    monkeypatch.setattr(reads, "_BLOCK", 4)
    monkeypatch.setattr(opening, "FRAMES", 70)
    monkeypatch.setattr(opening, "_ROUNDS", 1)


@pytest.fixture(scope="module")
def recipe(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe of a made-up teacher of small maps."""
    folder = tmp_path_factory.mktemp("recipe")
    return kit.write(folder / "cache.yaml", kit.synthetic_recipe(world, Path("x3kd")))


@pytest.fixture
def samples(tmp_path: Path, small: None, recipe: Path) -> Path:
    del small
    folder = tmp_path / "samples"
    folder.mkdir()
    reads.write_samples(folder, load_cache(str(recipe), []), 2, Silent())
    return folder


@pytest.mark.parametrize("name", ["zarr-python", "zarrs", "tensorstore", "safetensors"])
def test_peers_read_what_the_cache_holds(name: str, samples: Path) -> None:
    reader = CacheReader.open(samples / "cache")
    found = peers.open_peer(name, samples)(4)
    if isinstance(found, dict):
        boxes = reader.read(reader.tokens[4], ["boxes"])["boxes"]
        assert np.array_equal(found["boxes"], boxes)
        assert found["bev_low"].dtype == np.float16
        return
    stored = sorted(np.asarray(array).tobytes() for array in found)
    wanted = reader.read(reader.tokens[4], tuple(reader.manifest.spec.signals))
    assert stored == sorted(array.tobytes() for array in wanted.values())


@pytest.mark.parametrize("name", ["limit", "bevkd", "HDF5", "LMDB + zstd", "npy memmap"])
def test_peers_that_fill_buffers_read_every_sample(name: str, samples: Path) -> None:
    read = peers.open_peer(name, samples)
    for sample in range(6):
        read(sample)
    with pytest.raises(Exception, match=r"."):
        read(6)
    assert peers.files_of(name, samples)


def test_sections_give_the_figures_that_they_promise(tmp_path: Path, recipe: Path) -> None:
    settings = BenchSettings(tmp_path, cache=str(recipe), rounds=1, sections=("reads", "s3", "opening", "stage1"))
    result = json.loads(json.dumps(bench_store(settings, Silent())))
    assert KEYS & set(result) == {
        "read_cpu_over_limit", "peers", "s3_requests_per_read", "open_seconds", "stage1_over_forward",
    }  # fmt: skip
    assert set(result["peers"]) == set(peers.names()) - {"limit", "bevkd"}
    assert result["s3"]["requests_again"] == 0
    assert result["opening"]["frames"] == 70
    assert result_tables(result)


def test_an_unknown_section_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--only speed: the sections are reads, s3"):
        bench_store(BenchSettings(tmp_path / "out", sections=("speed",)), Silent())
    assert not (tmp_path / "out").exists()


def test_every_promised_figure_has_a_section() -> None:
    source = Path(bench_store.__code__.co_filename).read_text(encoding="utf-8")
    assert all(f'"{key}"' in source for key in KEYS)
    assert set(BenchSettings(Path()).sections) == set(SECTIONS)
