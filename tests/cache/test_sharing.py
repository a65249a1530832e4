"""Listing, comparing, copying and removing caches."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from bevkd.cache import transfer
from bevkd.cache.catalogue import differences, listing
from bevkd.cache.local import LocalStore
from bevkd.cache.manifest import open_manifest
from bevkd.cache.verify import verify
from bevkd.cache.writer import CacheWriter
from bevkd.errors import CacheError
from bevkd.progress import Silent
from tests.cache import kit


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two caches, one that is unfinished, one that is damaged, and things that are no caches."""
    folder = tmp_path_factory.mktemp("shelf")
    kit.write(folder / "first", kit.header())
    kit.write(folder / "second", kit.header(licence="CC BY"))
    unfinished = CacheWriter.open(folder / "third", kit.header(), kit.SHAPES)
    unfinished.write_block(1, kit.samples(unfinished.header.block_tokens(1)))
    kit.write(folder / "worn", kit.header())
    (folder / "worn" / "manifest.json").write_text("{")
    (folder / "pictures").mkdir()
    (folder / "notes.txt").touch()
    return folder


def test_a_folder_of_caches_is_listed_with_their_states(shelf: Path) -> None:
    first, _, third, worn = listing(shelf)
    assert (first.uri, first.state, first.frames, first.spec) == (str(shelf / "first"), "sealed", 11, "test")
    assert first.name == open_manifest(LocalStore(shelf / "first")).name
    assert first.bytes == sum(path.stat().st_size for path in (shelf / "first").glob("*/c.*"))
    assert (third.state, third.name) == ("1 of 3 blocks", "")
    assert worn.state.startswith("damaged: manifest.json")


def test_a_cache_is_listed_by_itself(shelf: Path) -> None:
    (entry,) = listing(shelf / "first")
    assert entry.uri == str(shelf / "first")


def test_listing_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match=r"cannot list .*nowhere"):
        listing(tmp_path / "nowhere")


def test_two_caches_are_compared_by_what_they_say_of_themselves(shelf: Path, tmp_path: Path) -> None:
    first = open_manifest(LocalStore(shelf / "first"))
    assert differences(first, first) == []
    assert differences(first, open_manifest(LocalStore(shelf / "second"))) == [
        "licence: 'CC0' in the first, 'CC BY' in the second"
    ]
    kit.write(tmp_path, kit.header(9))
    found = differences(first, open_manifest(LocalStore(tmp_path)))
    assert "tokens: 2 only in the first, 0 only in the second" in found


def test_shards_that_differ_are_found_by_their_checksums(shelf: Path, tmp_path: Path) -> None:
    writer = CacheWriter.open(tmp_path, kit.header(licence="other"), kit.SHAPES)
    for block in range(3):
        tokens = writer.header.block_tokens(block)
        writer.write_block(block, [kit.sample(token if block != 1 else f"{token} again") for token in tokens])
    found = differences(open_manifest(LocalStore(shelf / "first")), writer.seal())
    assert "bev_low: 1 of 3 blocks hold other values, the first is 1" in found


def test_a_copy_is_the_same_cache_byte_by_byte(shelf: Path, tmp_path: Path) -> None:
    transfer.copy(shelf / "first", tmp_path / "deep" / "copy", Silent())
    assert kit.tree(tmp_path / "deep" / "copy") == kit.tree(shelf / "first")


def test_copying_again_changes_nothing(shelf: Path, tmp_path: Path) -> None:
    for _ in range(2):
        manifest = transfer.copy(shelf / "first", tmp_path / "copy", Silent())
    assert manifest.name == open_manifest(LocalStore(tmp_path / "copy")).name


def test_an_interrupted_copy_goes_on_where_it_stopped(
    shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[str] = []
    fetch = LocalStore.fetch

    def counting(self: LocalStore, key: str, path: Path, limit: int) -> object:
        fetched.append(key)
        if len(fetched) == 20:
            raise OSError(5, "the network is gone")
        return fetch(self, key, path, limit)

    monkeypatch.setattr(LocalStore, "fetch", counting)
    monkeypatch.setattr(transfer, "STREAMS", 1)
    with pytest.raises(CacheError, match=r"the network is gone.*run the same command again"):
        transfer.copy(shelf / "first", tmp_path / "copy", Silent())
    assert not (tmp_path / "copy" / "manifest.json").exists()
    fetched.clear()
    transfer.copy(shelf / "first", tmp_path / "copy", Silent())
    assert len(fetched) == 8  # the arrays of the one block that was missing
    assert kit.tree(tmp_path / "copy") == kit.tree(shelf / "first")


def test_a_damaged_source_is_not_copied(shelf: Path, tmp_path: Path) -> None:
    transfer.copy(shelf / "first", tmp_path / "source", Silent())
    path = tmp_path / "source" / "bev_low" / "c.1.0.0.0"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    with pytest.raises(CacheError, match=r"bev_low/c\.1\.0\.0\.0 is damaged.*CRC-32C"):
        transfer.copy(tmp_path / "source", tmp_path / "copy", Silent())
    assert not (tmp_path / "copy" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("second", "holds another cache"),
        ("third", "the beginning of another|other shards"),
        ("pictures/..", "not empty"),
    ],
)
def test_a_target_that_holds_something_else_is_refused(shelf: Path, target: str, message: str, tmp_path: Path) -> None:
    kit.write(tmp_path / "source", kit.header(config={"seed": 2}))
    before = kit.tree(shelf)
    with pytest.raises(CacheError, match=message):
        transfer.copy(tmp_path / "source", shelf / target, Silent())
    assert kit.tree(shelf) == before


def test_an_unfinished_cache_is_not_copied(shelf: Path, tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="not sealed: 1 of 3 blocks"):
        transfer.copy(shelf / "third", tmp_path / "copy", Silent())


@pytest.mark.parametrize("name", ["first", "third"])
def test_removing_takes_the_whole_cache_and_its_folder(shelf: Path, name: str, tmp_path: Path) -> None:
    for key, content in kit.tree(shelf / name).items():
        (tmp_path / name / key).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name / key).write_bytes(content)
    files, size = transfer.contents(tmp_path / name)
    assert (files, size) == (len(kit.tree(shelf / name)), sum(map(len, kit.tree(shelf / name).values())))
    assert transfer.remove(tmp_path / name) == []
    assert not (tmp_path / name).exists()


def test_removing_leaves_what_is_not_the_caches_own(tmp_path: Path) -> None:
    kit.write(tmp_path / "cache", kit.header())
    for name in ("notes.txt", "bev_low/mine.npy"):
        (tmp_path / "cache" / name).write_text("mine")
    assert transfer.remove(tmp_path / "cache") == ["notes.txt", "bev_low/mine.npy"]
    assert set(kit.tree(tmp_path / "cache")) == {"notes.txt", "bev_low/mine.npy"}


def test_what_is_no_cache_is_not_removed(shelf: Path, tmp_path: Path) -> None:
    (tmp_path / "zarr.json").write_text(json.dumps({"zarr_format": 3, "node_type": "group", "attributes": {}}))
    for folder in (tmp_path, shelf / "pictures"):
        with pytest.raises(CacheError):
            transfer.remove(folder)
    assert (tmp_path / "zarr.json").exists()


def test_verify_names_the_samples_of_a_damaged_shard(tmp_path: Path) -> None:
    kit.write(tmp_path, kit.header())
    path = tmp_path / "bev_low" / "c.1.0.0.0"
    data = np.fromfile(path, np.uint8)
    data[200] ^= 4
    path.write_bytes(data.tobytes())
    (fault,) = verify(tmp_path)
    assert "bev_low/c.1.0.0.0" in fault
    assert "the damage is in sample 'token-004'" in fault
