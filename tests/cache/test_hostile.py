"""Nothing in a cache of a stranger can run code, leave its folder, take all memory, or be misread in silence."""

from __future__ import annotations

import ast
import json
import os
import re
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bevkd.cache import manifest as manifest_module
from bevkd.cache import shard, transfer
from bevkd.cache.catalogue import differences, listing
from bevkd.cache.manifest import MANIFEST, ROOT, open_manifest
from bevkd.cache.reader import CacheReader
from bevkd.cache.store import open_store, record_of
from bevkd.cache.verify import verify
from bevkd.cache.writer import CacheWriter
from bevkd.errors import CacheError
from bevkd.progress import Silent
from tests.cache import kit

HOSTILE: tuple[Any, ...] = (
    None, True, -1, 0, 1.5, 2**31, 2**62, 2**64, 10**400, 1e308, -1e308, "", "..", "../../etc/passwd", "/etc/passwd",
    "a\x1b[2J", "__import__('os').system('touch pwned')", "\ud800", "x" * 100_000, [], {}, [[]], {"a": {}},
    ["a"] * 1000,
    {"__class__": "os"}, [2**40, 2**40, 2**40], "NaN", "\u0000", "s3://elsewhere/cache", "file:///etc",
)  # fmt: skip
"""Values that a stranger may put anywhere in the JSON of a cache."""


def sites(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value in a JSON document."""
    if path:
        yield path
    for key, child in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        yield from sites(child, (*path, key))


def put(node: Any, path: tuple[Any, ...], value: Any) -> None:
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value


def reseal(folder: Path, data: dict[str, Any]) -> None:
    """Write a manifest with a name that fits it, as somebody who knows the format would."""
    data["name"] = manifest_module.name_of(data)
    (folder / MANIFEST).write_text(json.dumps(data))


def use(folder: Path, scratch: Path) -> None:
    """Do everything that people do with a cache."""
    sealed = open_manifest(open_store(folder))
    reader = CacheReader.open(folder)
    assert differences(sealed, reader.manifest) == []
    for token in reader.tokens:
        for signal in reader.manifest.spec.signals:
            reader.signal(token, signal)
    transfer.copy(folder, scratch / "copy", Silent())


@pytest.fixture
def limited_memory() -> Iterator[None]:
    """Let the process have 4 GiB more than it has, so that a bomb fails here and not on the user's machine."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 4 * 2**30, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def everything_under(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.usefixtures("limited_memory")
@pytest.mark.parametrize("file", [MANIFEST, ROOT, "bev_low/zarr.json", "commits/1.json"])
def test_hostile_values_anywhere_in_metadata_are_refused_or_harmless(file: str, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    kit.write(folder, kit.header(6, 3))
    before = everything_under(tmp_path)
    whole = json.loads((folder / file).read_text())
    rng, places = np.random.default_rng(0), list(sites(whole))
    refused = 0
    for value in HOSTILE * (10 if file == MANIFEST else 1):
        data = json.loads(json.dumps(whole))
        put(data, places[rng.integers(len(places))], value)
        refused += not _survives(folder, file, data, tmp_path)
        copied = {"copy"} | {f"copy/{name}" for name in everything_under(folder)}
        assert everything_under(tmp_path) - before <= copied
        _remove(tmp_path / "copy")
    assert refused > 5 or file == "bev_low/zarr.json"  # which is for other readers: ours does not look at it


def _survives(folder: Path, file: str, data: dict[str, Any], scratch: Path) -> bool:
    """Return whether a cache with ``data`` as ``file`` can be used; only a CacheError may say that it cannot."""
    good = {name: (folder / name).read_bytes() for name in (MANIFEST, file)}
    try:
        if file == MANIFEST:
            reseal(folder, data)
        else:
            (folder / file).write_text(json.dumps(data))
            _accept(folder, file)
        listing(folder)
        verify(folder, deep=True)
        use(folder, scratch)
        (folder / MANIFEST).unlink()
        listing(folder)
        return CacheWriter.open(folder, kit.header(6, 3), kit.SHAPES).seal() is not None
    except CacheError:
        return False
    except UnicodeEncodeError:  # a lone surrogate: the test cannot even write it as a file
        return False
    finally:
        for name, content in good.items():
            (folder / name).write_bytes(content)


def _accept(folder: Path, file: str) -> None:
    """Make the manifest fit a metadata file or commit record that was changed."""
    sealed = json.loads((folder / MANIFEST).read_text())
    if file in sealed["files"]:
        sealed["files"][file] = record_of((folder / file).read_bytes()).model_dump(mode="json")
    reseal(folder, sealed)


def _remove(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True) if folder.exists() else ():
        path.rmdir() if path.is_dir() else path.unlink()
    if folder.exists():
        folder.rmdir()


@pytest.mark.parametrize(
    "name", ["manifest.json", "zarr.json", "bev_low/zarr.json", "bev_low/c.0.0.0.0", "boxes_count/c.0", "bev_low"]
)
def test_a_symbolic_link_is_not_followed(name: str, tmp_path: Path) -> None:
    kit.write(tmp_path / "cache", kit.header(6, 3))
    inside, outside = tmp_path / "cache" / name, tmp_path / "outside"
    inside.rename(outside)
    inside.symlink_to(outside)
    with pytest.raises(CacheError):
        use(tmp_path / "cache", tmp_path)
    assert verify(tmp_path / "cache")


def test_a_cache_that_is_itself_a_link_is_used(tmp_path: Path) -> None:
    kit.write(tmp_path / "cache", kit.header(6, 3))
    (tmp_path / "link").symlink_to(tmp_path / "cache")
    use(tmp_path / "link", tmp_path)


def test_a_named_pipe_does_not_block_the_reader(tmp_path: Path) -> None:
    kit.write(tmp_path / "cache", kit.header(6, 3))
    path = tmp_path / "cache" / "bev_low" / "c.0.0.0.0"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(CacheError, match="no regular file"):
        use(tmp_path / "cache", tmp_path)


def _bomb(size: int) -> bytes:
    return shard.compress(np.zeros(size, np.uint8))


@pytest.mark.usefixtures("limited_memory")
@pytest.mark.parametrize(
    "make", [lambda: _bomb(2**27), lambda: _bomb(383), lambda: _bomb(385), lambda: b"", lambda: b"\x28\xb5\x2f\xfd"]
)
def test_a_sample_that_decompresses_to_another_size_is_refused(make: Callable[[], bytes], tmp_path: Path) -> None:
    kit.write(tmp_path / "cache", kit.header(3, 3))
    sealed = json.loads((tmp_path / "cache" / MANIFEST).read_text())
    _replace_shard(tmp_path / "cache", sealed, "bev_low/c.0.0.0.0", [make()] * 3)
    with pytest.raises(CacheError, match=r"'token-000'.*bev_low/c\.0.*(wrong size|larger than|damaged)"):
        CacheReader.open(tmp_path / "cache").read("token-000", ["bev_low"])


def _replace_shard(folder: Path, sealed: dict[str, Any], key: str, samples: list[bytes]) -> None:
    """Put samples of a stranger into a shard whose index, checksums and records all fit."""
    (folder / key).unlink()
    with shard.ShardWriter(folder / key, sealed["spec"]["block"]) as writer:
        for sample in samples:
            writer.append(sample)
        record = writer.finish().model_dump(mode="json")
    sealed["records"][0]["arrays"][key.partition("/")[0]] = record
    (folder / "commits" / "0.json").write_text(json.dumps(sealed["records"][0]))
    reseal(folder, sealed)


@pytest.mark.parametrize("count", [-1, 7, 2**31 - 1])
def test_a_number_of_boxes_that_there_cannot_be_is_refused(count: int, tmp_path: Path) -> None:
    kit.write(tmp_path / "cache", kit.header(3, 3))
    sealed = json.loads((tmp_path / "cache" / MANIFEST).read_text())
    _replace_shard(tmp_path / "cache", sealed, "boxes_count/c.0", [shard.compress(np.array(count, np.int32))] * 3)
    with pytest.raises(CacheError, match=f"boxes_count is {count}, it must be 0 to 6"):
        CacheReader.open(tmp_path / "cache").boxes("token-000")


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 900 + "1" + "}" * 900, '{"grid": NaN}', '{"a": 1e999}', "\x00", ""]
)
def test_texts_that_break_parsers_are_refused(text: str, tmp_path: Path) -> None:
    kit.write(tmp_path, kit.header(3, 3))
    for name in (MANIFEST, ROOT):
        (tmp_path / name).write_text(text)
    with pytest.raises(CacheError):
        CacheReader.open(tmp_path)
    (tmp_path / MANIFEST).unlink()
    assert listing(tmp_path)[0].state.startswith("damaged")


def test_a_huge_manifest_is_not_read(tmp_path: Path) -> None:
    kit.write(tmp_path, kit.header(3, 3))
    with (tmp_path / MANIFEST).open("r+b") as file:
        file.truncate(2**40)
    with pytest.raises(CacheError, match=r"1,099,511,627,776 bytes, more than"):
        CacheReader.open(tmp_path)


def test_no_module_that_reads_a_cache_can_run_code_from_it() -> None:
    folder = Path(manifest_module.__file__).parent
    for path in folder.glob("*.py"):
        names = {node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)}
        assert not names & {"pickle", "eval", "exec", "compile", "__import__", "marshal"}, path
        assert not re.search(r"allow_pickle=True|torch\.load|yaml\.load|np\.load", path.read_text()), path
