"""How the headers of two caches differ."""

from __future__ import annotations

from typing import Any

from bevkd.cache.manifest import Header
from bevkd.errors import CacheError, report


def check_same(place: str, existing: Header, wanted: Header) -> None:
    """Check that a run may go on with a cache that another run began; package versions may differ.

    Raises:
        CacheError: names every field that differs.
    """
    faults = [
        f"{key}: the cache has {old!r}, this run {new!r}" for key, old, new in header_differences(existing, wanted)
    ]
    if existing.tokens != wanted.tokens:
        added, gone = set(wanted.tokens) - set(existing.tokens), set(existing.tokens) - set(wanted.tokens)
        how = f"{len(added)} are new, {len(gone)} are gone" if added or gone else "their order differs"
        faults.append(f"tokens: the cache has {len(existing.tokens)}, this run {len(wanted.tokens)}; {how}")
    if faults:
        headline = (
            f"{place} was begun by a different run. Write to another folder, undo these differences, or delete the "
            "folder to start again:"
        )
        raise report(CacheError, headline, faults)


def header_differences(first: Header, second: Header) -> list[tuple[str, Any, Any]]:
    """Return the path and both values of every field that differs, but tokens and package versions."""
    fields = set(Header.model_fields) - {"tokens", "versions"}
    old, new = (_flat(header.model_dump(mode="json", include=fields)) for header in (first, second))
    keys = sorted(old.keys() | new.keys())
    return [(key, old.get(key, "nothing"), new.get(key, "nothing")) for key in keys if old.get(key) != new.get(key)]


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    return {
        path: leaf
        for key, child in value.items()
        for path, leaf in _flat(child, f"{prefix}.{key}" if prefix else str(key)).items()
    }
