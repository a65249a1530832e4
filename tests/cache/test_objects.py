"""Object stores: publishing under contention, faults in words, processes."""

from __future__ import annotations

import gc
import multiprocessing
import os
import tempfile
import time
from multiprocessing.context import BaseContext
from pathlib import Path

import pytest

from bevkd.cache import object_client, objects
from bevkd.cache.objects import ObjectStore
from bevkd.cache.store import FileRecord, open_store, record_of
from bevkd.errors import CacheError
from pipeline.bench.local_s3 import FAULT_KINDS, Fault, FaultKind, LocalS3

KEY, SECOND = "bev_low/c.0.0.0.0", "boxes/c.0.0.0"


@pytest.fixture
def store(bucket: str) -> ObjectStore:
    return ObjectStore.open(f"{bucket}/cache")


@pytest.fixture
def staging(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def staged(store: ObjectStore, **contents: bytes) -> tuple[dict[str, Path], dict[str, FileRecord]]:
    keys = {name: {"low": KEY, "boxes": SECOND}[name] for name in contents}
    paths = {keys[name]: store.stage(keys[name]) for name in contents}
    for name, data in contents.items():
        paths[keys[name]].write_bytes(data)
    return paths, {keys[name]: record_of(data) for name, data in contents.items()}


# ---------------------------------------------------------------------------------------------- addresses


@pytest.mark.parametrize("uri", ["s3://", "s3:///cache", "s3://bucket/../other", "s3://bucket//cache", "s3://b/./c"])
def test_an_address_that_leads_nowhere_is_refused(uri: str) -> None:
    with pytest.raises(CacheError, match=r"is no address of a cache\. Write it as s3://bucket/folder/cache"):
        open_store(uri)


def test_a_cache_may_fill_a_bucket_or_a_part_of_it(bucket: str) -> None:
    whole, part = open_store(f"{bucket}/"), open_store(f"{bucket}/team/cache/")
    part.create("zarr.json", b"text")
    assert (whole.uri, part.uri) == (bucket, f"{bucket}/team/cache")
    assert whole.read("team/cache/zarr.json", 4) == b"text"
    assert whole.folders() == ["team"]
    assert part.place("zarr.json") == f"{bucket}/team/cache/zarr.json"


# ---------------------------------------------------------------------------------------------- publishing


def test_a_block_costs_one_upload_and_one_look_per_shard(store: ObjectStore, s3: LocalS3) -> None:
    assert store.publish(*staged(store, low=b"mine", boxes=b"boxes"))
    assert s3.counts() == {"PUT shard": 2, "HEAD shard": 2}


def test_waiting_for_another_attempt_uploads_nothing(store: ObjectStore, s3: LocalS3) -> None:
    assert store.publish(*staged(store, low=b"theirs"))
    mine = staged(store, low=b"mine, longer")
    assert not store.publish(*mine)
    s3.reset()
    assert not store.publish(*mine)
    assert s3.counts() == {"HEAD shard": 1}


def test_seizing_replaces_what_another_attempt_has_published(store: ObjectStore) -> None:
    theirs, mine = staged(store, low=b"theirs", boxes=b"boxes"), staged(store, low=b"mine", boxes=b"boxes")
    assert store.publish(*theirs)
    assert not store.publish(*mine)
    assert store.publish(*mine, seize=True)
    assert store.read(KEY, 10) == b"mine"
    assert not store.publish(*theirs)


def test_a_shard_that_is_replaced_while_others_are_uploaded_is_noticed(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, rival = object_client.Client.put, ObjectStore.open(store.uri)

    def put(client: object_client.Client, key: str, content: bytes | Path, over: str | None = None) -> str | None:
        if key.endswith(SECOND):
            monkeypatch.setattr(object_client.Client, "put", before)
            rival.replace(KEY, b"theirs")
        return before(client, key, content, over)

    monkeypatch.setattr(object_client.Client, "put", put)
    assert not store.publish(*staged(store, low=b"mine", boxes=b"boxes"))


def test_seizing_does_not_replace_what_it_has_not_seen(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    rival = ObjectStore.open(store.uri)
    assert store.publish(*staged(store, low=b"theirs"))
    mine = staged(store, low=b"mine")
    assert not store.publish(*mine)
    before = object_client.Client.put

    def put(client: object_client.Client, key: str, content: bytes | Path, over: str | None = None) -> str | None:
        monkeypatch.setattr(object_client.Client, "put", before)
        rival.replace(KEY, b"another")
        return before(client, key, content, over)

    monkeypatch.setattr(object_client.Client, "put", put)
    assert not store.publish(*mine, seize=True)
    assert store.read(KEY, 10) == b"another"
    assert store.publish(*mine, seize=True)
    assert store.read(KEY, 10) == b"mine"


def test_published_shards_survive_an_attempt_that_fails(store: ObjectStore) -> None:
    paths, records = staged(store, low=b"mine")
    assert store.publish(paths, records)
    store.discard(paths, committed=False)
    assert store.read(KEY, 4) == b"mine"


def test_staged_files_are_private_and_leave_no_folder(store: ObjectStore, staging: Path) -> None:
    paths, _ = staged(store, low=b"mine", boxes=b"boxes")
    assert {path.parent.stat().st_mode & 0o777 for path in paths.values()} == {0o700}
    store.discard(paths, committed=True)
    assert list(staging.iterdir()) == []


def test_the_staging_folders_of_dead_processes_are_swept(
    store: ObjectStore, staging: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects, "_NEW_S", 0.0)
    mine, _ = staged(store, low=b"mine")
    dead = staging / "bevkd-stage-dead"
    dead.mkdir()
    (dead / "shard").write_bytes(b"half a sha")
    (staging / "bevkd-stage-link").symlink_to(staging / "elsewhere")
    (staging / "elsewhere").mkdir()
    store.sweep(("",), everything=True)
    assert not dead.exists()
    assert mine[KEY].exists()
    assert (staging / "elsewhere").exists()


# ---------------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize("kind", FAULT_KINDS)
def test_one_failed_request_is_repeated(store: ObjectStore, s3: LocalS3, kind: FaultKind) -> None:
    def survives() -> None:
        s3.fail(Fault(kind, stall_s=2.0))

    survives()
    assert store.create("zarr.json", b"0123456789")
    survives()
    assert store.read("zarr.json", 10) == b"0123456789"
    survives()
    assert store.record("zarr.json") == record_of(b"0123456789")
    survives()
    assert store.sizes("") == {"zarr.json": 10}
    survives()
    assert store.publish(*staged(store, low=b"mine"))
    survives()
    store.remove("zarr.json")
    assert not store.exists("zarr.json")


def test_a_conflict_of_conditional_writes_is_repeated(store: ObjectStore, s3: LocalS3) -> None:
    s3.fail(Fault("answer", status=409, code="ConditionalRequestConflict", times=2))
    assert store.create("zarr.json", b"text")
    assert len(s3.requests()) == 3


@pytest.mark.parametrize("kind", FAULT_KINDS)
def test_a_store_that_always_fails_ends_in_an_error_in_time(
    store: ObjectStore, s3: LocalS3, monkeypatch: pytest.MonkeyPatch, kind: FaultKind
) -> None:
    monkeypatch.setenv("BEVKD_STORE_RETRY_S", "0.6")
    s3.fail(Fault(kind, times=None, stall_s=2.0))
    words = {"slow_down": "answers 503", "error": "answers 500", "error_after": "answers 500", "stall": "not answer"}
    begin = time.monotonic()
    with pytest.raises(OSError, match=words.get(kind, "was cut")) as error:
        store.create("zarr.json", b"text")
    assert time.monotonic() - begin < 2.5
    assert "BEVKD_STORE_RETRY_S=0.6" in str(error.value.strerror)
    assert error.value.filename == store.place("zarr.json")
    assert len(s3.requests()) > 1


@pytest.mark.usefixtures("s3")
def test_a_bucket_that_does_not_exist_is_named() -> None:
    store = open_store("s3://no-such-bucket/cache")
    for fail in (lambda: store.read("a", 1), lambda: store.create("a", b""), store.empty):
        with pytest.raises(FileNotFoundError, match="bucket 'no-such-bucket' does not exist; check the address"):
            fail()


def test_missing_credentials_are_named_at_once(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(PermissionError, match="set AWS_ACCESS_KEY_ID"):
        store.exists("zarr.json")


def test_a_profile_that_does_not_exist_is_named(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(PermissionError, match=r"profile.*nobody"):
        store.exists("zarr.json")


def test_credentials_of_a_profile_are_used(store: ObjectStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    (tmp_path / "credentials").write_text("[team]\naws_access_key_id = a\naws_secret_access_key = b\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_PROFILE", "team")
    assert not store.exists("zarr.json")


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (403, "AccessDenied", "denies access; check the credentials and their rights"),
        (403, "InvalidAccessKeyId", "does not know the access key"),
        (403, "SignatureDoesNotMatch", "refuses the secret key"),
        (403, "RequestTimeTooSkewed", "clock is wrong"),
        (400, "ExpiredToken", "have expired; renew them"),
        (301, "PermanentRedirect", "another region; set AWS_REGION"),
        (501, "NotImplemented", "no conditional writes"),
    ],
)
def test_a_refusal_is_said_in_words_and_not_repeated(
    store: ObjectStore, s3: LocalS3, status: int, code: str, words: str
) -> None:
    s3.fail(Fault("answer", status=status, code=code, times=None))
    with pytest.raises(OSError, match=words):
        store.create("zarr.json", b"text")
    assert len(s3.requests()) == 1


def test_plain_http_must_be_allowed(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ALLOW_HTTP")
    with pytest.raises(OSError, match="set AWS_ALLOW_HTTP=true"):
        store.exists("zarr.json")


@pytest.mark.parametrize(
    ("endpoint", "cause"), [("http://127.0.0.1:9", "refused"), ("http://no-such-host.invalid", "lookup|resolve|name")]
)
def test_an_endpoint_that_cannot_be_reached_is_told_soon(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch, endpoint: str, cause: str
) -> None:
    monkeypatch.setattr(object_client, "FIRST_CONTACT_S", 0.3)
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    begin = time.monotonic()
    with pytest.raises(OSError, match=rf"cannot be reached \(.*({cause}).*\); check the network and the address"):
        store.exists("zarr.json")
    assert time.monotonic() - begin < 3


def test_a_number_of_seconds_that_is_none_is_refused(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BEVKD_STORE_RETRY_S", "soon")
    with pytest.raises(OSError, match="BEVKD_STORE_RETRY_S=soon is no number of seconds"):
        store.exists("zarr.json")


# ---------------------------------------------------------------------------------------------- processes


def read_there(store: ObjectStore, environment: dict[str, str]) -> None:
    """Read twice in another process; its exit code says whether that worked."""
    os.environ.update(environment)
    assert store.read("zarr.json", 10) == b"text"
    with pytest.raises(FileNotFoundError, match="there is no such object"):
        store.read("nothing", 10)


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
@pytest.mark.usefixtures("context")
def test_a_store_works_in_another_process_and_afterwards_in_this_one(
    store: ObjectStore, s3: LocalS3, method: str
) -> None:
    store.create("zarr.json", b"text")
    there: BaseContext = multiprocessing.get_context(method)
    process = there.Process(target=read_there, args=(store, s3.environment))  # type: ignore[attr-defined]
    process.start()
    process.join(60)
    assert process.exitcode == 0
    for _ in range(20):
        assert store.read("zarr.json", 10) == b"text"


def test_a_fork_that_frees_what_it_inherited_leaves_the_parent_its_connections(store: ObjectStore) -> None:
    store.create("zarr.json", b"text")
    for _ in range(3):
        child = os.fork()
        if child == 0:
            gc.collect()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert store.read("zarr.json", 10) == b"text"


def test_a_forked_process_whose_helper_is_killed_gets_an_error_and_a_new_one(store: ObjectStore) -> None:
    store.create("zarr.json", b"text")
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = _outlive_a_helper(store)
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def _outlive_a_helper(store: ObjectStore) -> int:
    assert store.read("zarr.json", 10) == b"text"
    connection = store._client._connection  # type: ignore[attr-defined]
    connection.close()
    store._client._connection = multiprocessing.Pipe()[0]  # type: ignore[attr-defined]
    with pytest.raises(OSError, match="has ended; run again"):
        store.read("zarr.json", 10)
    return 0 if store.read("zarr.json", 10) == b"text" else 1
