from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bevkd.cache import local, shard, writer
from bevkd.cache.reader import CacheReader
from bevkd.cache.verify import verify
from bevkd.cache.writer import CacheWriter, estimate_bytes
from bevkd.errors import CacheError, CacheSpecError
from bevkd.types import Boxes
from tests.cache import kit


def other_samples(tokens: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """Samples of a teacher that gives other values on every run."""
    return kit.samples([f"{token}, another run" for token in tokens])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a cache written without interruption."""
    folder = tmp_path_factory.mktemp("whole") / "cache"
    kit.write(folder, kit.header())
    return kit.tree(folder)


def test_a_written_cache_holds_exactly_its_files(whole: dict[str, bytes]) -> None:
    arrays = {
        "bev_high": 3, "bev_high_scale": 1, "bev_low": 3, "bev_low_scale": 1, "box_code": 4, "boxes": 2,
        "boxes_count": 0, "heatmap": 3,
    }  # fmt: skip
    shards = {f"{name}/c.{block}{'.0' * rank}" for name, rank in arrays.items() for block in range(3)}
    metadata = {"zarr.json", "manifest.json", *(f"{name}/zarr.json" for name in arrays)}
    assert set(whole) == shards | metadata | {f"commits/{block}.json" for block in range(3)}


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    kit.write(tmp_path / "cache", kit.header())
    reader = CacheReader.open(tmp_path / "cache")
    for token in reader.tokens:
        wanted = kit.sample(token)
        for signal, tolerance in (("bev_low", 0.02), ("bev_high", 0.03), ("box_code", 2e-3)):
            assert np.abs(reader.signal(token, signal).numpy() - wanted[signal]).max() <= tolerance
        assert torch.equal(reader.signal(token, "boxes").values, wanted["boxes"].values)


def test_the_order_of_blocks_and_a_torch_teacher_change_no_byte(tmp_path: Path, whole: dict[str, bytes]) -> None:
    kit.write(tmp_path / "backwards", kit.header(), order=-1)
    assert kit.tree(tmp_path / "backwards") == whole
    written = CacheWriter.open(tmp_path / "torch", kit.header(), kit.SHAPES)
    for block in written.pending():
        batch = kit.samples(written.header.block_tokens(block))
        written.write_block(
            block, ({k: v if isinstance(v, Boxes) else torch.from_numpy(v) for k, v in s.items()} for s in batch)
        )
    written.seal()
    assert kit.tree(tmp_path / "torch") == whole


def test_a_file_address_is_a_path(tmp_path: Path) -> None:
    kit.write((tmp_path / "my cache"), kit.header(2))
    assert len(CacheReader.open((tmp_path / "my cache").as_uri())) == 2


@pytest.mark.parametrize(
    ("uri", "message"),
    [("ftp://host/cache", "unknown scheme 'ftp'.*s3://bucket/prefix"), ("file://host/cache", "lies on machine 'host'")],
)
def test_addresses_that_lead_nowhere_are_refused(uri: str, message: str) -> None:
    with pytest.raises(CacheError, match=message):
        CacheWriter.open(uri, kit.header(), kit.SHAPES)


def test_a_stopped_run_resumes_to_the_same_bytes(tmp_path: Path, whole: dict[str, bytes]) -> None:
    first = CacheWriter.open(tmp_path, kit.header(), kit.SHAPES)
    first.write_block(1, kit.samples(first.header.block_tokens(1)))
    assert CacheWriter.open(tmp_path, kit.header(), kit.SHAPES).pending() == [0, 2]
    kit.write(tmp_path, kit.header())
    assert kit.tree(tmp_path) == whole


def test_a_committed_block_is_not_computed_again(tmp_path: Path) -> None:
    cache = CacheWriter.open(tmp_path, kit.header(), kit.SHAPES)
    record = cache.write_block(0, kit.samples(cache.header.block_tokens(0)))

    def teacher() -> Iterator[dict[str, Any]]:
        raise AssertionError("the teacher ran")
        yield

    assert cache.write_block(0, teacher()) == record


def test_sealing_twice_and_a_rerun_on_a_sealed_cache_change_nothing(tmp_path: Path, whole: dict[str, bytes]) -> None:
    manifest = kit.write(tmp_path, kit.header())
    again = CacheWriter.open(tmp_path, kit.header(), kit.SHAPES)
    assert again.pending() == []
    assert again.seal() == manifest
    assert kit.tree(tmp_path) == whole


def test_samples_are_consumed_one_by_one(tmp_path: Path) -> None:
    cache = CacheWriter.open(tmp_path, kit.header(block=4), kit.SHAPES)
    alive: list[int] = []

    class Tracked(dict[str, Any]):
        def __del__(self) -> None:
            alive.pop()

    def teacher() -> Iterator[Tracked]:
        for token in cache.header.block_tokens(0):
            alive.append(1)
            assert len(alive) <= 2
            yield Tracked(kit.sample(token))

    cache.write_block(0, teacher())


def test_an_all_zero_sample_is_stored(tmp_path: Path) -> None:
    header = kit.header(2, block=2, signals={"bev_low": {"encoding": "uint8"}})
    cache = CacheWriter.open(tmp_path, header, kit.SHAPES)
    cache.write_block(0, [{"bev_low": torch.zeros(kit.SHAPES["bev_low"])}] * 2)
    cache.seal()
    reader = CacheReader.open(tmp_path)
    assert not reader.signal("token-001", "bev_low").any()
    (tmp_path / "bev_low" / "c.0.0.0.0").unlink()
    with pytest.raises(CacheError, match="token-001"):
        CacheReader.open(tmp_path).signal("token-001", "bev_low")


def test_a_rerun_with_another_header_names_every_difference(tmp_path: Path) -> None:
    CacheWriter.open(tmp_path, kit.header(), kit.SHAPES)
    teacher = kit.TEACHER.model_copy(update={"weights_sha256": "1" * 64})
    changed = kit.header(12, block=8, teacher=teacher, config={"seed": 2})
    with pytest.raises(CacheError) as error:
        CacheWriter.open(tmp_path, changed, kit.SHAPES)
    for part in ("weights_sha256", "spec.block", "config.seed", "config.rates", "tokens: ", "1 are new, 0 are gone"):
        assert part in str(error.value)
    assert "delete the folder" in str(error.value)


def test_tokens_in_another_order_are_another_header(tmp_path: Path) -> None:
    CacheWriter.open(tmp_path, kit.header(), kit.SHAPES)
    with pytest.raises(CacheError, match="their order differs"):
        CacheWriter.open(tmp_path, kit.header(tokens=kit.header().tokens[::-1]), kit.SHAPES)


def test_a_rerun_with_other_package_versions_goes_on(tmp_path: Path, whole: dict[str, bytes]) -> None:
    CacheWriter.open(tmp_path, kit.header(), kit.SHAPES)
    kit.write(tmp_path, kit.header(versions={"bevkd": "later"}))
    assert kit.tree(tmp_path) == whole


def test_a_folder_with_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CacheError, match="is not empty and holds no cache"):
        CacheWriter.open(tmp_path, kit.header(), kit.SHAPES)
    assert kit.tree(tmp_path) == {"notes.txt": b"mine"}


def test_a_foreign_zarr_group_is_refused(tmp_path: Path) -> None:
    (tmp_path / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group", "attributes": {}}')
    with pytest.raises(CacheError, match="is not of a bevkd cache"):
        CacheWriter.open(tmp_path, kit.header(), kit.SHAPES)


def test_a_map_that_the_teacher_does_not_write_is_refused_before_work(tmp_path: Path) -> None:
    with pytest.raises(CacheSpecError, match=r"which writes the maps heatmap: signals.bev_low needs bev_low"):
        CacheWriter.open(
            tmp_path, kit.header(signals={"bev_low": {"encoding": "uint8"}}), {"heatmap": kit.SHAPES["heatmap"]}
        )
    assert not kit.tree(tmp_path)


@pytest.mark.parametrize(
    ("signal", "shape", "fault"),
    [
        ("bev_low", (4, 8, 13), "but the grid is"),
        ("bev_low", (8, 12), r"must be \[C,Y,X\]"),
        ("box_code", (2, 9, 8, 12), r"must be \[T,10,Y,X\]"),
        ("heatmap", (4, 8, 12), "has 4 channels for 3 classes"),
        ("bev_low", (65_536, 8, 12), "grid|values per sample"),
    ],
)
def test_shapes_that_do_not_fit_are_refused_before_work(
    tmp_path: Path, signal: str, shape: tuple[int, ...], fault: str
) -> None:
    if shape[0] == 65_536:
        header = kit.header(
            grid={"x_m": (-64, 64), "y_m": (-64, 64), "cell_m": 1.0}, signals={signal: kit.SIGNALS[signal]}
        )
        shape = (65_536, 128, 128)
    else:
        header = kit.header()
    with pytest.raises(CacheError, match=fault):
        CacheWriter.open(tmp_path, header, kit.SHAPES | {signal: shape})
    assert not kit.tree(tmp_path)


@pytest.mark.parametrize("given", [3, 5])
def test_a_block_takes_exactly_one_sample_per_token(tmp_path: Path, given: int) -> None:
    cache = CacheWriter.open(tmp_path, kit.header(block=4), kit.SHAPES)
    before = kit.tree(tmp_path)
    with pytest.raises(CacheError, match=r"block 0 got .* give one per token"):
        cache.write_block(0, kit.samples([f"token-{index:03d}" for index in range(given)]))
    assert kit.tree(tmp_path) == before


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"bev_low": None}, "sample 'token-000' has no bev_low"),
        ({"bev_low": torch.zeros(4, 8, 11)}, r"bev_low of sample 'token-000' is \[4, 8, 11\]"),
        ({"bev_low": torch.full((4, 8, 12), torch.nan)}, "'token-000' has 384 non-finite"),
        ({"boxes": Boxes(torch.ones(1, 9), torch.tensor([3]), torch.ones(1))}, "labels from 3 to 3 for 3 classes"),
    ],
)
def test_a_bad_sample_leaves_nothing_behind(tmp_path: Path, changes: dict[str, Any], fault: str) -> None:
    cache = CacheWriter.open(tmp_path, kit.header(block=1), kit.SHAPES)
    before = kit.tree(tmp_path)
    with pytest.raises(CacheError, match=fault):
        cache.write_block(0, [kit.sample("token-000") | changes])
    assert kit.tree(tmp_path) == before


def test_a_failing_teacher_is_not_reported_as_a_failing_disk(tmp_path: Path) -> None:
    cache = CacheWriter.open(tmp_path, kit.header(), kit.SHAPES)

    def teacher() -> Iterator[dict[str, Any]]:
        yield kit.sample("token-000")
        raise OSError(errno.ENOSPC, "of the shared memory")

    with pytest.raises(OSError, match="of the shared memory"):
        cache.write_block(0, teacher())


def test_an_unfinished_cache_cannot_be_sealed(tmp_path: Path) -> None:
    cache = CacheWriter.open(tmp_path, kit.header(), kit.SHAPES)
    cache.write_block(0, kit.samples(cache.header.block_tokens(0)))
    with pytest.raises(CacheError, match="1 of 3 blocks are committed, the next is block 1"):
        cache.seal()


def test_a_shard_lost_before_sealing_is_noticed(tmp_path: Path, whole: dict[str, bytes]) -> None:
    cache = CacheWriter.open(tmp_path, kit.header(), kit.SHAPES)
    for block in cache.pending():
        cache.write_block(block, kit.samples(cache.header.block_tokens(block)))
    lost = tmp_path / "heatmap" / "c.1.0.0.0"
    lost.unlink()
    with pytest.raises(CacheError, match=r"c\.1\.0\.0\.0.*Delete .*1\.json"):
        cache.seal()
    (tmp_path / "commits" / "1.json").unlink()
    kit.write(tmp_path, kit.header())
    assert kit.tree(tmp_path) == whole


def fill_disk(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Let the disk be full after so many writes to shards."""
    left = [after]
    write = shard.ShardWriter._write

    def limited(self: shard.ShardWriter, data: bytes) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, data)

    monkeypatch.setattr(shard.ShardWriter, "_write", limited)


@pytest.mark.parametrize("after", [0, 20, 35, 39, 60])
def test_a_full_disk_is_reported_and_the_rerun_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: dict[str, bytes], after: int
) -> None:
    with monkeypatch.context() as patch:
        fill_disk(patch, after)
        with pytest.raises(CacheError, match=r"is full: about [\d,]+ more bytes are needed, [\d,]+ are free.*resumes"):
            kit.write(tmp_path, kit.header())
    assert not [name for name in kit.tree(tmp_path) if ".tmp-" in name]
    kit.write(tmp_path, kit.header())
    assert kit.tree(tmp_path) == whole


def test_a_disk_that_fills_up_with_the_commit_record_withdraws_the_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = CacheWriter.open(tmp_path, kit.header(), kit.SHAPES)
    before = kit.tree(tmp_path)

    def full(*_: object) -> bool:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(local.LocalStore, "create", full)
        with pytest.raises(CacheError, match="is full"):
            cache.write_block(0, kit.samples(cache.header.block_tokens(0)))
    assert kit.tree(tmp_path) == before


def test_a_file_system_without_hard_links_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(CacheError, match="without hard links"):
        CacheWriter.open(tmp_path, kit.header(), kit.SHAPES)


def test_the_estimate_is_on_the_safe_side(tmp_path: Path) -> None:
    header = kit.header(32, block=16)
    kit.write(tmp_path, header)
    stored = sum(len(data) for name, data in kit.tree(tmp_path).items() if "/c." in name)
    raw = sum(array.nbytes for array in CacheReader.open(tmp_path).manifest.arrays) * 32
    assert 0.5 * stored < estimate_bytes(header.spec, kit.SHAPES, 32) < 1.5 * raw


def abandoned(folder: Path, name: str, pid: int = 2**22 + 1, host: str | None = None) -> Path:
    """Write a temporary file of another process."""
    path = local._temporary(folder / name)
    parts = path.name.split("-")
    path = path.with_name("-".join([parts[0], host or parts[1], str(pid), *parts[3:]]))
    path.write_bytes(b"half")
    return path


def test_temporary_files_of_dead_processes_and_old_ones_are_removed(tmp_path: Path) -> None:
    CacheWriter.open(tmp_path, kit.header(), kit.SHAPES)
    gone = abandoned(tmp_path / "bev_low", "c.0.0.0.0"), abandoned(tmp_path / "commits", "0.json")
    old = abandoned(tmp_path / "boxes", "c.0.0.0", host="0" * 8)
    os.utime(old, (time.time() - 2 * local.STALE_S,) * 2)
    kept = abandoned(tmp_path, "manifest.json", os.getpid()), abandoned(tmp_path / "boxes", "c.1.0.0", host="0" * 8)
    CacheWriter.open(tmp_path, kit.header(), kit.SHAPES)
    assert not any(path.exists() for path in (*gone, old))
    assert all(path.exists() for path in kept)


def test_sealing_removes_all_temporary_files(tmp_path: Path, whole: dict[str, bytes]) -> None:
    CacheWriter.open(tmp_path, kit.header(), kit.SHAPES)
    abandoned(tmp_path / "bev_low", "c.0.0.0.0", os.getpid())
    abandoned(tmp_path / "boxes", "c.1.0.0", host="0" * 8)
    kit.write(tmp_path, kit.header())
    assert kit.tree(tmp_path) == whole


def test_shards_published_by_a_killed_attempt_are_withdrawn(tmp_path: Path, whole: dict[str, bytes]) -> None:
    CacheWriter.open(tmp_path, kit.header(), kit.SHAPES)
    temp = abandoned(tmp_path / "bev_low", "c.0.0.0.0")
    os.link(temp, tmp_path / "bev_low" / "c.0.0.0.0")
    kit.write(tmp_path, kit.header())
    assert kit.tree(tmp_path) == whole


def test_a_different_shard_without_record_is_never_mixed_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "PATIENCE_S", 0.1)
    cache = CacheWriter.open(tmp_path, kit.header(), kit.SHAPES)
    (tmp_path / "bev_low" / "c.0.0.0.0").write_bytes(b"of another attempt")
    with pytest.raises(CacheError, match=r"different content and no commit record.*delete .*bev_low/c\.0"):
        cache.write_block(0, kit.samples(cache.header.block_tokens(0)))


def test_two_attempts_of_a_teacher_that_is_not_deterministic_do_not_mix(tmp_path: Path) -> None:
    header = kit.header(24, block=2)
    writers = [CacheWriter.open(tmp_path, header, kit.SHAPES) for _ in range(2)]
    faults: list[BaseException] = []

    def work(cache: CacheWriter, run: Any) -> None:
        try:
            for block in range(header.blocks):
                cache.write_block(block, run(header.block_tokens(block)))
        except BaseException as error:
            faults.append(error)

    threads = [
        threading.Thread(target=work, args=pair) for pair in zip(writers, (kit.samples, other_samples), strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    writers[0].seal()
    assert verify(tmp_path, deep=True) == []
    reader = CacheReader.open(tmp_path)
    for token in reader.tokens:
        runs = [next(iter(run((token,)))) for run in (kit.samples, other_samples)]
        code, boxes = reader.signal(token, "box_code").numpy(), reader.signal(token, "boxes")
        same = [np.abs(code - run["box_code"]).max() < 0.01 for run in runs]
        assert sum(same) == 1
        assert torch.equal(boxes.values, runs[same.index(True)]["boxes"].values)
