"""Local copies of remote shards: one download per shard, a bounded folder, nothing else touched."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import pickle
import time
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from bevkd.cache import local_copy
from bevkd.cache.local import LocalStore
from bevkd.cache.local_copy import CopiedShards, LocalCopies, default_folder
from bevkd.cache.manifest import Manifest, read_manifest
from bevkd.cache.reader import CacheReader
from bevkd.cache.shard import shard_name
from bevkd.cache.store import FileRecord
from bevkd.errors import CacheError
from pipeline.bench.local_s3 import LocalS3
from tests.cache import kit

HEADER = kit.header(
    12,
    block=4,
    signals={name: kit.SIGNALS[name] for name in ("bev_low", "boxes")},
    sample_shapes={"bev_low": kit.SHAPES["bev_low"]},
)
KEYS = tuple(shard_name(array, block) for block in range(3) for array in HEADER.arrays)


class CountingStore(LocalStore):
    """A folder that counts what is fetched from it, in a file, because several processes do."""

    remote = True

    def __init__(self, folder: Path, log: Path) -> None:
        super().__init__(folder)
        self.log = log

    def fetch(self, key: str, path: Path, limit: int) -> FileRecord:
        with self.log.open("a") as log:
            log.write(f"{key}\n")
        return super().fetch(key, path, limit)

    @property
    def fetched(self) -> list[str]:
        return self.log.read_text().split() if self.log.exists() else []


@pytest.fixture(scope="module")
def sealed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sealed") / "cache"
    kit.write(folder, HEADER)
    return folder


@pytest.fixture(scope="module")
def manifest(sealed: Path) -> Manifest:
    return read_manifest(LocalStore(sealed))


@pytest.fixture
def store(sealed: Path, tmp_path: Path) -> CountingStore:
    return CountingStore(sealed, tmp_path / "log")


@pytest.fixture
def copies(tmp_path: Path) -> LocalCopies:
    return LocalCopies(tmp_path / "copies", 10**6)


@pytest.fixture
def shards(copies: LocalCopies, store: CountingStore, manifest: Manifest) -> CopiedShards:
    return copies.over(store, manifest)


def read(shards: CopiedShards, key: str) -> bytes:
    _, size = shards.read_tail(key, 1)
    return shards.read_range(key, 0, size)


def files(copies: LocalCopies) -> list[str]:
    return sorted(path.name for path in copies.folder.iterdir() if path.name != "bevkd-local-copies")


def test_a_shard_is_fetched_once_and_reads_as_in_the_store(shards: CopiedShards, store: CountingStore) -> None:
    for _ in range(2):
        for key in KEYS:
            content = (store.folder / key).read_bytes()
            assert shards.read_range(key, 3, 40) == content[3:43]
            assert shards.read_tail(key, 20) == (content[-20:], len(content))
            assert shards.read_tail(key, 10**6) == (content, len(content))
    assert store.fetched == list(KEYS)
    assert shards.place(KEYS[0]) == store.place(KEYS[0])


def test_copies_serve_the_next_run_and_another_process(
    shards: CopiedShards, store: CountingStore, copies: LocalCopies, manifest: Manifest
) -> None:
    read(shards, KEYS[0])
    read(copies.over(store, manifest), KEYS[0])
    read(pickle.loads(pickle.dumps(copies)).over(store, manifest), KEYS[0])
    read(pickle.loads(pickle.dumps(shards)), KEYS[0])
    assert store.fetched == [KEYS[0]]


def test_a_cache_that_was_made_anew_has_copies_of_its_own(
    shards: CopiedShards, store: CountingStore, copies: LocalCopies, tmp_path: Path
) -> None:
    read(shards, KEYS[0])
    again = kit.write(tmp_path / "again", HEADER.model_copy(update={"licence": "other"}))
    read(copies.over(CountingStore(tmp_path / "again", store.log), again), KEYS[0])
    assert store.fetched == [KEYS[0]] * 2


def test_copies_that_were_removed_are_fetched_again(
    shards: CopiedShards, store: CountingStore, copies: LocalCopies
) -> None:
    read(shards, KEYS[0])
    for path in copies.folder.iterdir():
        path.unlink()
    copies.folder.rmdir()
    assert read(shards, KEYS[0]) == (store.folder / KEYS[0]).read_bytes()
    assert store.fetched == [KEYS[0]] * 2


def test_a_dropped_copy_is_fetched_again(shards: CopiedShards, store: CountingStore, copies: LocalCopies) -> None:
    read(shards, KEYS[0])
    copy = copies.folder / files(copies)[0]
    copy.write_bytes(b"\0" * copy.stat().st_size)
    shards.drop(KEYS[0])
    shards.drop(KEYS[1])  # never copied
    assert read(shards, KEYS[0]) == (store.folder / KEYS[0]).read_bytes()


def test_a_shard_that_is_not_what_the_manifest_says_is_refused(
    copies: LocalCopies, manifest: Manifest, tmp_path: Path
) -> None:
    kit.write(tmp_path / "cache", HEADER)
    shards = copies.over(LocalStore(tmp_path / "cache"), manifest)
    damaged = tmp_path / "cache" / KEYS[0]
    data = damaged.read_bytes()
    damaged.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(OSError, match=r"what was downloaded has [\d,]+ bytes and CRC-32C \w{8}, the manifest says"):
        read(shards, KEYS[0])
    assert files(copies) == []
    damaged.write_bytes(data)
    assert read(shards, KEYS[0]) == data


def test_a_missing_shard_is_an_error_that_leaves_nothing(
    copies: LocalCopies, manifest: Manifest, tmp_path: Path
) -> None:
    shards = copies.over(LocalStore(tmp_path / "nothing"), manifest)
    with pytest.raises(FileNotFoundError):
        read(shards, KEYS[0])
    assert files(copies) == []


# ---------------------------------------------------------------------------------------------- the limit


def bounded(store: CountingStore, manifest: Manifest, folder: Path, blocks: float) -> CopiedShards:
    largest = max(sum(entry.bytes for entry in record.arrays.values()) for record in manifest.records)
    return LocalCopies(folder, int(largest * blocks)).over(store, manifest)


def taken(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.suffix == ".shard")


def test_the_least_recently_used_copies_make_room(store: CountingStore, manifest: Manifest, tmp_path: Path) -> None:
    shards = bounded(store, manifest, tmp_path / "copies", 2.0)
    blocks = [KEYS[i : i + len(KEYS) // 3] for i in range(0, len(KEYS), len(KEYS) // 3)]
    for age, block in ((200, 0), (300, 1)):
        for key in blocks[block]:
            read(shards, key)
            then = time.time() - age
            os.utime(shards._path(key), (then, then))
    for key in blocks[2]:
        read(shards, key)
    for key in blocks[0]:
        read(shards, key)
    assert store.fetched == [*blocks[0], *blocks[1], *blocks[2]]
    assert not any(Path(shards._path(key)).exists() for key in blocks[1][:1])
    assert taken(tmp_path / "copies") <= shards._copies.limit_bytes


def test_a_folder_smaller_than_the_cache_serves_all_of_it(
    store: CountingStore, manifest: Manifest, tmp_path: Path
) -> None:
    shards = bounded(store, manifest, tmp_path / "copies", 1.0)
    for _ in range(3):
        for key in KEYS:
            assert read(shards, key) == (store.folder / key).read_bytes()
            assert taken(tmp_path / "copies") <= shards._copies.limit_bytes


def test_use_keeps_a_copy(
    store: CountingStore, manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_copy, "_USED_S", 0.0)
    shards = bounded(store, manifest, tmp_path / "copies", 1.0)
    read(shards, KEYS[0])
    os.utime(shards._path(KEYS[0]), (1, 1))
    read(shards, KEYS[0])
    assert Path(shards._path(KEYS[0])).stat().st_mtime > 1


def test_a_limit_below_one_block_is_refused(copies: LocalCopies, store: CountingStore, manifest: Manifest) -> None:
    with pytest.raises(CacheError, match=r"the shards of one block take [\d,]+ bytes, but the limit of .* is 1,000 b"):
        LocalCopies(copies.folder, 1000).over(store, manifest)


def test_a_full_disk_is_told(
    shards: CopiedShards, store: CountingStore, copies: LocalCopies, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetch(_: str, path: Path, __: int) -> FileRecord:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store, "fetch", fetch)
    with pytest.raises(OSError, match=r"the disk of the local copies, .* is full: a shard of .* lower the limit"):
        read(shards, KEYS[0])
    assert files(copies) == []


# ---------------------------------------------------------------------------------------------- the folder


def test_a_folder_with_other_files_is_refused_and_left_alone(
    tmp_path: Path, store: CountingStore, manifest: Manifest
) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("text")
    with pytest.raises(CacheError, match=r"holds other files\. Give a new or empty folder"):
        LocalCopies(tmp_path / "home", 10**6).over(store, manifest)
    assert [path.name for path in (tmp_path / "home").iterdir()] == ["thesis.tex"]


def test_only_copies_are_removed_to_make_room(store: CountingStore, manifest: Manifest, tmp_path: Path) -> None:
    shards = bounded(store, manifest, tmp_path / "copies", 1.0)
    name = Path(shards._path(KEYS[0])).name
    others = ["notes.txt", f"x{name}", f"{name}.bak", name.replace("-", "_", 1)]
    for other in others:
        (tmp_path / "copies" / other).write_bytes(b"1" * 10**5)
    target = tmp_path / "target"
    target.write_text("text")
    (tmp_path / "copies" / name).symlink_to(target)
    for key in KEYS[1:]:
        read(shards, key)
    assert all((tmp_path / "copies" / other).exists() for other in others)
    assert target.read_text() == "text"


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path, store: CountingStore, manifest: Manifest) -> None:
    (tmp_path / "file").write_text("text")
    with pytest.raises(
        CacheError, match=r"local copies, .*file/copies, cannot be used: Not a directory\. Give another"
    ):
        LocalCopies(tmp_path / "file" / "copies", 10**6).over(store, manifest)


def test_the_default_folder_is_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("BEVKD_LOCAL_COPY", raising=False)
    assert default_folder() == Path("/home/someone/.cache/bevkd/shards")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/someone")
    assert default_folder() == Path("/var/someone/bevkd/shards")
    monkeypatch.setenv("BEVKD_LOCAL_COPY", "~/fast")
    assert default_folder() == Path("/home/someone/fast")
    assert LocalCopies().folder == Path("/home/someone/fast")


# ---------------------------------------------------------------------------------------------- processes


def read_all(shards: CopiedShards, times: int = 1) -> None:
    """Read every shard, in an order of this process's own, and compare."""
    for turn in range(times):
        shift = os.getpid() + turn
        for key in (KEYS[(shift + i) % len(KEYS)] for i in range(len(KEYS))):
            assert isinstance(shards._store, LocalStore)
            assert read(shards, key) == (shards._store.folder / key).read_bytes()


def test_processes_share_one_download(shards: CopiedShards, store: CountingStore) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=read_all, args=(shards,)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert sorted(store.fetched) == sorted(KEYS)


def test_processes_that_push_each_other_out_still_read_what_is_there(
    store: CountingStore, manifest: Manifest, copies: LocalCopies
) -> None:
    shards = bounded(store, manifest, copies.folder, 1.0)
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=read_all, args=(shards, 20)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 3
    assert not [name for name in files(copies) if name.endswith(".part")]


def test_a_download_that_died_is_done_again(shards: CopiedShards, store: CountingStore, copies: LocalCopies) -> None:
    path = Path(shards._path(KEYS[0]))
    path.with_name(f"{path.name}.part").write_bytes(b"half of it, and more than it ever had" * 1000)
    assert read(shards, KEYS[0]) == (store.folder / KEYS[0]).read_bytes()
    assert files(copies) == [path.name]


def test_a_download_that_hangs_does_not_stop_others(
    shards: CopiedShards, store: CountingStore, copies: LocalCopies, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_copy, "PATIENCE_S", 0.1)
    path = Path(shards._path(KEYS[0]))
    with path.with_name(f"{path.name}.part").open("wb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert read(shards, KEYS[0]) == (store.folder / KEYS[0]).read_bytes()
    assert files(copies) == [path.name, f"{path.name}.part"]


def test_a_file_system_without_locks_downloads_twice_at_worst(
    shards: CopiedShards, store: CountingStore, copies: LocalCopies, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(_: int, __: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    read_all(shards)
    assert store.fetched and set(files(copies)) >= {Path(shards._path(key)).name for key in KEYS}  # noqa: PT018


def test_downloads_of_others_are_not_removed_but_abandoned_ones_are(
    store: CountingStore, manifest: Manifest, tmp_path: Path
) -> None:
    shards = bounded(store, manifest, tmp_path / "copies", 1.0)
    held, dead = (Path(f"{shards._path(key)}.part") for key in KEYS[:2])
    for path in (held, dead):
        path.write_bytes(b"half")
        os.utime(path, (1, 1))
    with held.open("rb") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        for key in KEYS[2:]:
            read(shards, key)
        assert held.exists()
    assert not dead.exists()


# ---------------------------------------------------------------------------------------------- readers


def test_a_reader_of_a_remote_cache_reads_every_epoch_after_the_first_from_the_disk(
    bucket: str, s3: LocalS3, copies: LocalCopies, sealed: Path
) -> None:
    uri = f"{bucket}/cache"
    kit.write(uri, HEADER)
    reader, there = CacheReader.open(uri, copies), CacheReader.open(sealed)
    s3.reset()
    for _ in range(2):
        for token in there.tokens:
            for name, wanted in there.read(token, ["bev_low", "boxes"]).items():
                assert (reader.read(token, ["bev_low", "boxes"])[name] == wanted).all()
    assert s3.counts() == {"GET shard": len(KEYS)}


@pytest.mark.parametrize("copied", [False, True])
def test_forked_loader_workers_read_a_remote_cache_that_was_opened_before(
    bucket: str, copies: LocalCopies, sealed: Path, copied: bool, s3: LocalS3
) -> None:
    kit.write(f"{bucket}/cache", HEADER)
    there, here = CacheReader.open(f"{bucket}/cache", copies if copied else None), CacheReader.open(sealed)
    loader = DataLoader(kit.CachedMaps(there), batch_size=2, num_workers=2, multiprocessing_context="fork")
    s3.reset()
    maps = torch.cat(list(loader))
    wanted = kit.CachedMaps(here)
    assert torch.equal(maps, torch.stack([wanted[index] for index in range(len(here))]))
    if copied:
        assert s3.counts() == {"GET shard": 2 * 3}  # arrays of bev_low, blocks
    assert there.signal(there.tokens[0], "bev_low").shape == kit.SHAPES["bev_low"]


@pytest.mark.parametrize("harm", ["flip", "cut"])
def test_a_reader_fetches_a_harmed_copy_again(
    store: CountingStore, copies: LocalCopies, manifest: Manifest, sealed: Path, harm: str
) -> None:
    token = manifest.tokens[0]
    wanted = CacheReader.open(sealed).read(token, ["bev_low"])["bev_low"]
    CacheReader(store, manifest, copies).read(token, ["bev_low"])
    (name,) = (name for name in files(copies) if "-bev_low-0-" in name)
    data = bytearray((copies.folder / name).read_bytes())
    data[20] ^= 1
    (copies.folder / name).write_bytes(data if harm == "flip" else data[:100])
    assert (CacheReader(store, manifest, copies).read(token, ["bev_low"])["bev_low"] == wanted).all()
    assert store.fetched.count(KEYS[0]) == 2
