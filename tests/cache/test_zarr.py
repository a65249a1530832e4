"""A cache is plain Zarr: zarr-python reads it in a process that does not know bevkd."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import zarr

from bevkd.cache.local import LocalStore
from bevkd.cache.reader import CacheReader
from bevkd.cache.shard import read_index
from bevkd.cache.writer import CacheWriter
from tests.cache import kit

READ_ALL = """
import json, sys, warnings
warnings.simplefilter("error")
import numpy, zarr
group = zarr.open_group(sys.argv[1], mode="r")
numpy.savez(sys.argv[2], **{name: array[:] for name, array in group.arrays()})
described = {name: [array.metadata.dimension_names, array.attrs["meaning"]] for name, array in group.arrays()}
print(json.dumps([group.attrs["bevkd"]["tokens"], described]))
assert not [name for name in sys.modules if name.startswith(("bevkd", "torch"))]
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zarr") / "cache"
    kit.write(folder, kit.header())
    return folder


def test_zarr_reads_every_array_without_bevkd(cache: Path, tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", READ_ALL, str(cache), str(tmp_path / "all.npz")], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    tokens, described = json.loads(run.stdout)
    reader = CacheReader.open(cache)
    assert tuple(tokens) == reader.tokens
    with np.load(tmp_path / "all.npz") as arrays:
        assert set(arrays) == {array.name for array in reader.manifest.arrays}
        for index, token in enumerate(tokens):
            for name, value in reader.read(token, list(kit.SIGNALS)).items():
                assert arrays[name].dtype == value.dtype
                assert np.array_equal(arrays[name][index], value)
    assert described["bev_low"] == [["sample", "channel", "y", "x"], "bev_low * bev_low_scale[..., None, None]"]
    assert described["box_code"][0] == ["sample", "task", "code", "y", "x"]


def test_each_array_opens_on_its_own(cache: Path) -> None:
    for array in CacheReader.open(cache).manifest.arrays:
        opened = zarr.open_array(cache / array.name, mode="r")
        assert opened.shape == (11, *array.shape)
        assert opened.shards == (4, *array.shape)
        assert opened.chunks == (1, *array.shape)
        assert opened.fill_value == 0


def test_the_metadata_is_what_zarr_itself_would_write(cache: Path, tmp_path: Path) -> None:
    for array in CacheReader.open(cache).manifest.arrays:
        zarr.create_array(
            tmp_path / array.name,
            shape=(11, *array.shape),
            dtype=array.dtype,
            chunks=(1, *array.shape),
            shards=(4, *array.shape),
            compressors=[zarr.codecs.ZstdCodec(level=1, checksum=True)],
            fill_value=0,
            chunk_key_encoding={"name": "default", "separator": "."},
            dimension_names=["sample", *array.dims],
            attributes={"meaning": array.meaning},
        )
        written = json.loads((cache / array.name / "zarr.json").read_text())
        assert written == json.loads((tmp_path / array.name / "zarr.json").read_text())


def test_the_unused_slots_of_the_last_shard_are_marked(cache: Path) -> None:
    key = "bev_low/c.2.0.0.0"
    index = read_index(LocalStore(cache), key, 4, 3, (cache / key).stat().st_size, 4 * 8 * 12)
    assert (index[3] == 2**64 - 1).all()
    assert index[:3, 0].tolist() == np.cumsum([0, *index[:2, 1].tolist()]).tolist()


@pytest.mark.parametrize(("samples", "block"), [(1, 1), (1, 32), (8, 4), (5, 1)])
def test_zarr_reads_caches_of_any_length(tmp_path: Path, samples: int, block: int) -> None:
    header = kit.header(samples, block, signals={"heatmap": {"encoding": "float16"}})
    writer = CacheWriter.open(tmp_path, header, kit.SHAPES)
    for index in writer.pending():
        writer.write_block(index, kit.samples(header.block_tokens(index)))
    stored = zarr.open_group(tmp_path, mode="r")["heatmap"]
    wanted = np.stack([kit.sample(token)["heatmap"] for token in header.tokens]).astype(np.float16)
    assert np.array_equal(stored[:], wanted)
