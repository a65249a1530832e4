"""What every store does, on a disk and in an object store alike."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path

import pytest

from bevkd.cache.store import FileRecord, Store, open_store, record_of

KEYS = ("bev_low/c.0.0.0.0", "boxes/c.0.0.0")


@pytest.fixture(params=["disk", "s3"])
def new(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """A store that nobody has used."""
    uri = tmp_path / "a cache" if request.param == "disk" else f"{request.getfixturevalue('bucket')}/team/a cache"
    return open_store(uri)


@pytest.fixture
def store(new: Store) -> Store:
    """A store to which files can be written."""
    new.prepare(("bev_low", "boxes", "commits"))
    return new


def staged(store: Store, content: bytes) -> tuple[dict[str, Path], dict[str, FileRecord]]:
    """Stage two shards; the second is the same in every attempt."""
    paths = {}
    contents = dict(zip(KEYS, (content, b"boxes"), strict=True))
    for key, data in contents.items():
        paths[key] = store.stage(key)
        paths[key].write_bytes(data)
    return paths, {key: record_of(data) for key, data in contents.items()}


def content(store: Store, keys: tuple[str, ...] = KEYS) -> list[bytes]:
    return [store.read(key, 100) for key in keys]


def gone(paths: Mapping[str, Path]) -> bool:
    return not any(path.exists() for path in paths.values())


def test_a_new_store_is_empty(new: Store) -> None:
    assert new.empty()
    new.prepare(())
    assert new.empty()
    new.create("zarr.json", b"text")
    assert not new.empty()


def test_a_folder_that_is_empty_or_missing_has_no_files(store: Store) -> None:
    assert store.sizes("") == store.sizes("commits") == store.sizes("no/such/folder") == {}
    assert not store.exists("zarr.json")


def test_a_file_is_created_once(store: Store) -> None:
    assert store.create("commits/0.json", b"first")
    assert not store.create("commits/0.json", b"second")
    assert not store.create("commits/0.json", b"first")
    assert store.read("commits/0.json", 5) == b"first"
    assert store.exists("commits/0.json")


def test_a_file_is_replaced(store: Store) -> None:
    for data in (b"first", b"", b"third"):
        store.replace("zarr.json", data)
        assert store.read("zarr.json", 5) == data
        assert store.record("zarr.json") == record_of(data)


def test_a_file_is_removed_and_may_be_gone_already(store: Store) -> None:
    store.create("zarr.json", b"text")
    for _ in range(2):
        store.remove("zarr.json")
        assert not store.exists("zarr.json")


def test_a_part_of_a_file_is_read(store: Store) -> None:
    store.create("zarr.json", b"0123456789")
    assert store.read_range("zarr.json", 2, 3) == b"234"
    assert store.read_range("zarr.json", 8, 5) == b"89"
    assert store.read_range("zarr.json", 20, 5) == b""
    assert store.read_range("zarr.json", 2, 0) == b""


def test_the_end_of_a_file_comes_with_its_size(store: Store) -> None:
    store.create("zarr.json", b"0123456789")
    store.create("manifest.json", b"")
    assert store.read_tail("zarr.json", 3) == (b"789", 10)
    assert store.read_tail("zarr.json", 30) == (b"0123456789", 10)
    assert store.read_tail("manifest.json", 3) == (b"", 0)


def test_a_file_is_fetched_over_what_was_there(store: Store, tmp_path: Path) -> None:
    store.create("zarr.json", b"0123456789")
    path = tmp_path / "fetched"
    path.write_bytes(b"something that is longer")
    assert store.fetch("zarr.json", path, 10) == record_of(b"0123456789")
    assert path.read_bytes() == b"0123456789"


def test_a_file_beyond_the_limit_is_not_read(store: Store, tmp_path: Path) -> None:
    store.create("zarr.json", b"0123456789")
    with pytest.raises(OSError, match="more than the 9") as read:
        store.read("zarr.json", 9)
    with pytest.raises(OSError, match="more than the 9") as fetched:
        store.fetch("zarr.json", tmp_path / "fetched", 9)
    assert (read.value.strerror, fetched.value.strerror) != (None, None)


@pytest.mark.parametrize("method", ["read", "read_range", "read_tail", "record", "fetch"])
def test_a_missing_file_is_told_apart(store: Store, tmp_path: Path, method: str) -> None:
    arguments = {"read": (1,), "read_range": (0, 1), "read_tail": (1,), "record": (), "fetch": (tmp_path / "f", 1)}
    with pytest.raises(FileNotFoundError) as error:
        getattr(store, method)("zarr.json", *arguments[method])
    assert error.value.strerror


def test_files_and_folders_are_listed_one_level_deep(store: Store) -> None:
    for key, data in (("zarr.json", b"1"), ("commits/0.json", b"22"), ("commits/1.json", b""), ("boxes/a/b", b"3")):
        if key == "boxes/a/b":
            store.prepare(("boxes/a",))
        store.create(key, data)
    assert store.sizes("") == {"zarr.json": 1}
    assert store.sizes("commits") == {"0.json": 2, "1.json": 0}
    assert store.sizes("boxes") == {}
    assert set(store.folders()) >= {"boxes", "commits"}
    assert "zarr.json" not in store.folders()


def test_a_name_that_only_begins_alike_is_another_folder(store: Store) -> None:
    store.prepare(("bev", "bev_low"))
    store.create("bev_low/zarr.json", b"1")
    assert store.sizes("bev") == {}


def test_a_store_is_the_same_after_pickling(store: Store) -> None:
    store.create("zarr.json", b"text")
    again: Store = pickle.loads(pickle.dumps(store))
    assert again.uri == store.uri
    assert again.place("zarr.json") == store.place("zarr.json")
    assert again.read("zarr.json", 4) == b"text"


# ---------------------------------------------------------------------------------------------- publishing


def test_staged_files_are_published_and_removed(store: Store) -> None:
    paths, records = staged(store, b"mine")
    assert store.publish(paths, records)
    assert content(store) == [b"mine", b"boxes"]
    store.discard(paths, committed=True)
    assert gone(paths)
    assert content(store) == [b"mine", b"boxes"]


def test_publishing_again_changes_nothing(store: Store) -> None:
    paths, records = staged(store, b"mine")
    assert store.publish(paths, records)
    assert store.publish(paths, records)
    assert content(store) == [b"mine", b"boxes"]


def test_what_an_equal_attempt_has_published_counts(store: Store) -> None:
    for _ in range(2):
        paths, records = staged(store, b"same")
        assert store.publish(paths, records)
    assert content(store) == [b"same", b"boxes"]


@pytest.mark.parametrize("other", [b"mime", b"longer"])
def test_what_another_attempt_has_published_stays(store: Store, other: bytes) -> None:
    assert store.publish(*staged(store, other))
    paths, records = staged(store, b"mine")
    for _ in range(2):
        assert not store.publish(paths, records)
    store.discard(paths, committed=False)
    assert gone(paths)
    assert content(store) == [other, b"boxes"]


def test_nothing_is_left_of_what_was_never_published(store: Store) -> None:
    paths, _ = staged(store, b"mine")
    store.discard(paths, committed=False)
    assert gone(paths)
    store.sweep(("", "bev_low", "boxes", "commits"), everything=True)
    assert not any(store.exists(key) for key in KEYS)
    assert [store.sizes(folder) for folder in ("", "bev_low", "boxes")] == [{}] * 3
