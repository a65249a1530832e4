from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from bevkd.cache.local import LocalStore
from bevkd.cache.manifest import Manifest, name_of, to_json
from bevkd.cache.reader import CacheReader
from bevkd.cache.verify import verify
from bevkd.cache.writer import CacheWriter
from bevkd.errors import CacheError
from bevkd.grid import BEVGrid
from tests.cache import kit

Damage = Callable[[Path], object]


@pytest.fixture(scope="module")
def sealed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sealed") / "cache"
    kit.write(folder, kit.header())
    return folder


@pytest.fixture
def cache(sealed: Path, tmp_path: Path) -> Path:
    """A sealed cache of 11 samples in blocks of 4, to be damaged."""
    return shutil.copytree(sealed, tmp_path / "cache")


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << (bit % 8)
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])  # a lost line feed at the end would be harmless


def read_all(folder: Path) -> None:
    reader = CacheReader.open(folder)
    for token in reader.tokens:
        reader.read(token, list(kit.SIGNALS))


def test_tokens_manifest_and_membership(cache: Path) -> None:
    reader = CacheReader.open(cache)
    assert reader.tokens == kit.header().tokens
    assert len(reader) == 11
    assert "token-010" in reader
    assert "token-011" not in reader
    assert reader.manifest.teacher == kit.TEACHER
    assert reader.manifest.frame == "LIDAR frame, [C,Y,X]"


def test_reading_gives_the_stored_arrays_of_the_signals_asked_for(cache: Path) -> None:
    reader = CacheReader.open(cache)
    found = reader.read("token-005", ["boxes", "bev_low"])
    assert {name: (array.shape, array.dtype.name) for name, array in found.items()} == {
        "boxes": ((6, 11), "float32"),
        "boxes_count": ((), "int32"),
        "bev_low": ((4, 8, 12), "uint8"),
        "bev_low_scale": ((4,), "float32"),
    }
    assert all(array.flags.writeable for array in found.values())


def test_reading_fills_the_buffers_it_is_given(cache: Path) -> None:
    reader = CacheReader.open(cache)
    batch = np.full((2, 4, 8, 12), 99, np.uint8)
    found = reader.read("token-005", ["bev_low"], out={"bev_low": batch[1]})
    assert found["bev_low"].base is batch
    assert np.array_equal(batch[1], reader.read("token-005", ["bev_low"])["bev_low"])
    assert (batch[0] == 99).all()


@pytest.mark.parametrize(
    "buffer",
    [np.empty((4, 8, 11), np.uint8), np.empty((4, 8, 12), np.int8), np.empty((12, 8, 4), np.uint8).T],
    ids=["shape", "type", "order"],
)
def test_a_buffer_that_does_not_fit_is_refused(cache: Path, buffer: np.ndarray) -> None:
    with pytest.raises(CacheError, match=r"out\['bev_low'\] must be a contiguous uint8 array of \(4, 8, 12\)"):
        CacheReader.open(cache).read("token-005", ["bev_low"], out={"bev_low": buffer})


def test_an_unknown_token_and_an_unknown_signal_are_named(cache: Path) -> None:
    reader = CacheReader.open(cache)
    with pytest.raises(CacheError, match="holds no sample 'token-099'"):
        reader.read("token-099", ["bev_low"])
    with pytest.raises(CacheError, match="holds no bev_mid, only"):
        reader.read("token-001", ["bev_mid"])


def test_no_cache_and_an_unfinished_cache_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="there is no cache at"):
        CacheReader.open(tmp_path / "none")
    writer = CacheWriter.open(tmp_path / "cache", kit.header(), kit.SHAPES)
    writer.write_block(1, kit.samples(writer.header.block_tokens(1)))
    with pytest.raises(CacheError, match=r"is not sealed: 1 of 3 blocks are committed\. Run cache-teacher"):
        CacheReader.open(tmp_path / "cache")


def test_a_sealed_cache_has_no_fault(cache: Path) -> None:
    assert verify(cache) == []
    assert verify(cache, deep=True) == []


@pytest.mark.parametrize("damage", [Path.unlink, truncate, lambda path: path.write_bytes(b"")])
@pytest.mark.parametrize(
    "name",
    ["zarr.json", "manifest.json", "heatmap/zarr.json", "bev_low_scale/c.1.0", "boxes_count/c.2", "bev_low/c.0.0.0.0"],
)
def test_a_missing_or_cut_file_raises(cache: Path, name: str, damage: Damage) -> None:
    damage(cache / name)
    with pytest.raises(CacheError):
        read_all(cache)
    assert verify(cache)


@pytest.mark.parametrize("name", ["zarr.json", "manifest.json", "boxes/zarr.json"])
def test_a_flipped_bit_in_metadata_raises(cache: Path, name: str) -> None:
    data = (cache / name).read_bytes()
    for bit in np.random.default_rng(0).integers(0, len(data) * 8, 25).tolist():
        flip(cache / name, bit)
        with pytest.raises(CacheError):
            CacheReader.open(cache)
        flip(cache / name, bit)
    assert verify(cache) == []


def test_a_flipped_bit_of_a_shard_raises_or_changes_nothing(cache: Path) -> None:
    manifest, path = CacheReader.open(cache).manifest, cache / "bev_low_scale" / "c.1.0"
    tokens = manifest.records[1].tokens
    whole = [CacheReader(LocalStore(cache), manifest).read(token, ["bev_low"])["bev_low_scale"] for token in tokens]
    silent = 0
    for bit in np.random.default_rng(0).permutation(len(path.read_bytes()) * 8)[:400].tolist():
        flip(path, bit)
        try:
            reader = CacheReader(LocalStore(cache), manifest)
            found = [reader.read(token, ["bev_low"])["bev_low_scale"] for token in tokens]
            assert np.array_equal(found, whole)
            silent += 1
            assert reader_faults(cache)
        except CacheError:
            pass
        flip(path, bit)
    assert silent <= 2 * len(tokens)  # reserved bits of the four frame headers


def reader_faults(cache: Path) -> list[str]:
    return [fault for fault in verify(cache) if "CRC-32C" in fault]


def test_a_damaged_sample_is_named_with_its_shard_and_the_way_out(cache: Path) -> None:
    flip(cache / "bev_low" / "c.1.0.0.0", 200)
    with pytest.raises(CacheError) as error:
        CacheReader.open(cache).read("token-004", ["bev_low"])
    for part in ("'token-004'", "bev_low/c.1.0.0.0", "Restore the file", "delete manifest.json, commits/1.json"):
        assert part in str(error.value)


def test_the_advice_for_a_damaged_shard_repairs_the_cache(cache: Path) -> None:
    whole = kit.tree(cache)
    flip(cache / "bev_low" / "c.1.0.0.0", 200)
    for path in [cache / "manifest.json", cache / "commits" / "1.json", *cache.glob("*/c.1*")]:
        path.unlink()
    kit.write(cache, kit.header())
    assert kit.tree(cache) == whole


@pytest.mark.parametrize("damage", [Path.unlink, truncate, lambda path: flip(path, 1000)])
def test_verification_finds_a_damaged_commit_record(cache: Path, damage: Damage) -> None:
    damage(cache / "commits" / "1.json")
    assert len(verify(cache)) == 1
    assert "1.json" in verify(cache)[0]


def test_verification_reports_all_damaged_shards_at_once(cache: Path) -> None:
    (cache / "heatmap" / "c.0.0.0.0").unlink()
    truncate(cache / "boxes" / "c.1.0.0")
    flip(cache / "bev_low" / "c.2.0.0.0", 99)
    faults = verify(cache)
    assert [name for name in ("heatmap/c.0", "boxes/c.1", "bev_low/c.2") if any(name in fault for fault in faults)] == [
        "heatmap/c.0", "boxes/c.1", "bev_low/c.2",
    ]  # fmt: skip
    assert len(faults) == 3


def forge(cache: Path, change: Callable[[dict], object]) -> None:
    """Change the manifest and give it the name that fits."""
    path = cache / "manifest.json"
    data = json.loads(path.read_text())
    change(data)
    data["name"] = name_of(data)
    path.write_bytes(to_json(data))


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.update(tokens=data["tokens"][::-1]),
        lambda data: data["tokens"].append("token-000"),
        lambda data: data["records"].pop(),
        lambda data: data["records"][0]["arrays"].update({"../../secret": data["records"][0]["arrays"].pop("boxes")}),
        lambda data: data["files"].update({"../zarr.json": data["files"].pop("zarr.json")}),
        lambda data: data["sample_shapes"].update(bev_low=[2**40, 8, 12]),
        lambda data: data["sample_shapes"].update(bev_low=[-4, 8, 12]),
        lambda data: data["sample_shapes"].update(bev_low=[65536, 65536, 65536]),
        lambda data: data["spec"].update(block=2**31),
        lambda data: data["spec"]["signals"].update({"../boxes": data["spec"]["signals"]["boxes"]}),
        lambda data: data["records"][0]["arrays"]["boxes"].update(bytes=-1),
        lambda data: data["records"][1].update(teacher="f" * 64),
        lambda data: data.update(extra=1),
        lambda data: data.pop("grid"),
    ],
)
def test_a_hostile_manifest_is_refused(cache: Path, change: Callable[[dict], object]) -> None:
    forge(cache, change)
    with pytest.raises(CacheError):
        CacheReader.open(cache)


def test_a_later_schema_asks_for_an_upgrade(cache: Path) -> None:
    forge(cache, lambda data: data.update(schema_version=2, novelty=True))
    with pytest.raises(CacheError, match=r"has schema version 2, this bevkd reads 1\. Upgrade bevkd"):
        CacheReader.open(cache)


@pytest.mark.parametrize("text", ["[]", "[" * 100_000, "{", '{"name": NaN}', "\xff"])
def test_a_manifest_that_is_no_mapping_is_refused(cache: Path, text: str) -> None:
    (cache / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CacheError, match=r"manifest\.json"):
        CacheReader.open(cache)


def test_the_name_is_the_digest_of_the_content(tmp_path: Path) -> None:
    first = kit.write(tmp_path / "first", kit.header(3))
    second = kit.write(tmp_path / "second", kit.header(3))
    other = kit.write(tmp_path / "other", kit.header(3, licence="other"))
    assert first.name == second.name != other.name
    assert Manifest.model_validate(json.loads((tmp_path / "first" / "manifest.json").read_text())) == first


def test_a_fitting_contract_has_no_fault(cache: Path) -> None:
    reader, header = CacheReader.open(cache), kit.header()
    assert reader.require(list(kit.SIGNALS), kit.GRID, header.tokens[3:], kit.CLASSES, header.dataset) == []


def test_the_contract_names_all_faults_at_once(cache: Path) -> None:
    dataset = kit.header().dataset.model_copy(update={"split": "val", "annotation_digest": "b2"})
    faults = CacheReader.open(cache).require(
        ["bev_low", "bev_mid"],
        BEVGrid(x_m=(-6, 6), y_m=(-4, 4), cell_m=0.5),
        ["token-001", "x1", "x2", "x3", "x4"],
        ("truck", "car", "pedestrian"),
        dataset,
    )
    text = "\n".join(faults)
    for part in (
        "bev_mid is not stored", "cell 1.0 m", "cell 0.5 m", "wanted are truck, car",
        "dataset.annotation_digest", "has a1", "wanted is b2", "4 of 5 samples are not in the cache: x1, x2, x3, ...",
    ):  # fmt: skip
        assert part in text
    assert len(faults) == 5


def test_a_subset_or_another_split_of_the_same_data_set_fits(cache: Path) -> None:
    dataset = kit.header().dataset.model_copy(update={"split": "a tenth", "frames": 1})
    assert CacheReader.open(cache).require(["boxes"], tokens=["token-004"], dataset=dataset) == []


def test_a_pickled_reader_holds_no_manifest_and_opens_again(cache: Path) -> None:
    reader = CacheReader.open(cache)
    data = pickle.dumps(reader)
    assert len(data) < 1000
    assert pickle.loads(data).signal("token-003", "bev_low").equal(reader.signal("token-003", "bev_low"))


@pytest.mark.parametrize(("method", "workers"), [("fork", 2), ("spawn", 1)])
# torch keeps threads, and forking beside threads warns from Python 3.12 on; the reader has none
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_loader_workers_read_the_same(cache: Path, method: str, workers: int) -> None:
    reader = CacheReader.open(cache)
    reader.signal("token-000", "bev_low")
    loader = DataLoader(kit.CachedMaps(reader), num_workers=workers, multiprocessing_context=method)
    found = torch.cat(list(loader))
    assert found.equal(torch.stack([reader.signal(token, "bev_low") for token in reader.tokens]))
