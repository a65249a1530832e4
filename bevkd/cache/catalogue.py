"""Which caches lie in a folder or bucket, and how two of them differ. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bevkd.cache import manifest
from bevkd.cache.headers import header_differences
from bevkd.cache.manifest import MANIFEST, ROOT, Header, Manifest
from bevkd.cache.store import Store, open_store
from bevkd.cache.variants import frames_in
from bevkd.errors import CacheError


@dataclass(frozen=True)
class Entry:
    """One cache in a listing.

    Attributes:
        state: ``sealed``, ``3 of 7 blocks``, or what is wrong with it.
        name: content digest; empty until sealed.
        bytes: of all shards that are committed; 0 where unknown.
    """

    uri: str
    state: str
    name: str = ""
    teacher: str = ""
    dataset: str = ""
    frames: int = 0
    spec: str = ""
    signals: tuple[str, ...] = ()
    bytes: int = 0


def stored_bytes(sealed: Manifest) -> int:
    """Return the bytes of all shards."""
    return sum(entry.bytes for record in sealed.records for entry in record.arrays.values())


def listing(uri: str | Path) -> list[Entry]:
    """Return the cache at ``uri``, or all caches in the folders directly under it, by name of folder.

    Caches that are unfinished or damaged are listed with what is wrong.

    Raises:
        CacheError: there is no such folder, or it cannot be read.
    """
    store = open_store(uri)
    try:
        if store.exists(ROOT):
            return [_entry(store)]
        places = [f"{store.uri.rstrip('/')}/{folder}" for folder in store.folders()]
        stores = [child for place in places if (child := open_store(place)).exists(ROOT)]
        return [_entry(child) for child in stores]
    except OSError as error:
        raise CacheError(f"cannot list {store.uri}: {error.strerror}. Check the address and its rights.") from error


def _entry(store: Store) -> Entry:
    try:
        if store.exists(MANIFEST):
            sealed = manifest.read_manifest(store)
            return _described(store, sealed, "sealed", sealed.name, stored_bytes(sealed))
        header = manifest.read_header(store)
        return _described(store, header, f"{len(manifest.committed(store))} of {header.blocks} blocks", "", 0)
    except CacheError as error:
        return Entry(store.uri, f"damaged: {str(error).splitlines()[0].removeprefix(store.uri).lstrip('/')}")


def _described(store: Store, header: Header, state: str, name: str, size: int) -> Entry:
    dataset = f"{header.dataset.name} {header.dataset.version} {header.dataset.split}"
    signals = tuple(f"{signal} {spec.encoding}" for signal, spec in header.spec.signals.items())
    return Entry(
        store.uri,
        state,
        name,
        header.teacher.name,
        dataset,
        len(frames_in(header.tokens)),
        header.spec.name,
        signals,
        size,
    )


def differences(first: Manifest, second: Manifest) -> list[str]:
    """Return in what two caches differ, as far as their manifests say; nothing if they are the same cache.

    The shards of a signal are compared by checksum, where both caches hold the same tokens in the same blocks.
    """
    if first.name == second.name:
        return []
    found = [
        f"{field}: {old!r} in the first, {new!r} in the second" for field, old, new in header_differences(first, second)
    ]
    if first.tokens != second.tokens:
        old, new = set(first.tokens), set(second.tokens)
        same = "; the same frames in another order" if old == new else ""
        found.append(f"tokens: {len(old - new)} only in the first, {len(new - old)} only in the second{same}")
    elif first.spec.block == second.spec.block:
        found += _shard_differences(first, second)
    if first.statistics != second.statistics:
        found.append("statistics: of the features differ")
    if first.self_check != second.self_check:
        checks = (cache.self_check.summary if cache.self_check else "none" for cache in (first, second))
        found.append("self_check: {} in the first; {} in the second".format(*checks))
    return found


def _shard_differences(first: Manifest, second: Manifest) -> list[str]:
    shared = [array.name for array in first.arrays if array.name in {other.name for other in second.arrays}]
    found = []
    for name in shared:
        pairs = zip(first.records, second.records, strict=True)
        changed = [one.block for one, other in pairs if one.arrays[name] != other.arrays[name]]
        if changed:
            found.append(
                f"{name}: {len(changed)} of {first.blocks} blocks hold other values, the first is {changed[0]}"
            )
    return found
