"""Flipped bits and cut files, anywhere in a sealed cache: reported by reader and verify, never misread."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from bevkd.cache.reader import CacheReader
from bevkd.cache.verify import verify
from bevkd.errors import CacheError
from tests.cache import kit

Values = dict[tuple[str, str], bytes]


def read(folder: Path) -> tuple[Values, dict[tuple[str, str], str]]:
    """Return every array of every sample that can be read, and the error of every one that cannot."""
    values, errors = {}, {}
    reader = CacheReader.open(folder)
    for token in reader.tokens:
        for array in reader.arrays(tuple(reader.manifest.spec.signals)):
            try:
                values[token, array.name] = reader.read_array(token, array).tobytes()
            except CacheError as error:
                errors[token, array.name] = str(error)
    return values, errors


def damages(folder: Path, count: int, seed: int) -> Iterator[tuple[Path, bytes, bytes]]:
    """Yield a file, its content and a damaged one, ``count`` times: three flipped bits for each cut.

    Files are drawn evenly, so that metadata get as many as data.
    """
    rng = np.random.default_rng(seed)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for number in range(count):
        path = files[rng.integers(len(files))]
        content = path.read_bytes()
        if number % 4 == 3:
            yield path, content, content[: rng.integers(len(content))]
            continue
        bit = int(rng.integers(len(content) * 8))
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        yield path, content, bytes(damaged)


@pytest.mark.parametrize(("count", "seed"), [(120, 0), pytest.param(1000, 1, marks=pytest.mark.slow)])
def test_all_damage_is_reported_and_none_changes_a_value(count: int, seed: int, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    kit.write(folder, kit.header(7, 3))
    whole, _ = read(folder)
    silent = 0
    for path, content, damaged in damages(folder, count, seed):
        path.write_bytes(damaged)
        silent += _check(folder, path, whole)
        path.write_bytes(content)
    assert verify(folder, deep=True) == []
    assert silent < count / 2


def _check(folder: Path, path: Path, whole: Values) -> bool:
    """Check the reader's and verify's answer to one damaged file; return whether no value was touched."""
    key = str(path.relative_to(folder))
    faults = verify(folder)
    assert any(key in fault for fault in faults), key
    try:
        values, errors = read(folder)
    except CacheError as error:
        assert key in str(error)  # noqa: PT017 - that it may be raised is the point
        return False
    assert values.items() <= whole.items(), f"a damaged {key} was misread"
    for (token, array), message in errors.items():
        assert f"'{token}'" in message
        assert key in message
        assert any(key in fault and f"{array}/c." in fault for fault in faults)
    if errors:
        assert any(f"'{token}'" in fault for token, _ in errors for fault in faults)
    return not errors
