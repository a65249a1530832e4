"""Which frames are labelled, and names in messages: what all sources share."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from bevkd.errors import DataError


def check_labels(labels: object) -> object:
    """Return the option ``labels`` if it is a fraction, a list or a path; raises ValueError saying what it must be."""
    if isinstance(labels, bool) or (isinstance(labels, int | float) and not 0 <= labels <= 1):
        raise ValueError(f"a fraction of labelled frames must be from 0 to 1, got {labels}")
    if not isinstance(labels, int | float | str | Path | list | tuple):
        raise ValueError("give a fraction, a list of scene names, or the path of a file with a token per line")
    return labels


def drawn(groups: Mapping[str, Sequence[str]], fraction: float, seed: int) -> frozenset[str]:
    """Return tokens of whole groups, drawn until ``fraction`` of all is reached; the same ones on every machine.

    Args:
        groups: tokens by the name of what must not be torn apart.
        seed: changes the groups that are drawn.
    """
    wanted = fraction * sum(map(len, groups.values()))
    chosen: list[str] = []
    for name in sorted(groups, key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest()):
        if len(chosen) >= wanted - 1e-6:
            break
        chosen += groups[name]
    return frozenset(chosen)


def listed(path: Path, known: Sequence[str]) -> frozenset[str]:
    """Return the tokens in a file with one per line.

    Raises:
        DataError: the file cannot be read, or a token is not among ``known``.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"'labels' names the file {path}, which cannot be read: {error}.") from error
    tokens = frozenset(line.strip() for line in lines if line.strip())
    foreign = sorted(tokens.difference(known))
    if foreign:
        raise DataError(
            f"{path} lists {len(foreign)} token(s) that are not among the {len(known)} frames: {some(foreign)}. "
            "Correct the file, or widen the split."
        )
    return tokens


def some(names: Sequence[str], most: int = 5) -> str:
    """Return the first names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
