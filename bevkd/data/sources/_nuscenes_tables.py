"""The JSON tables of a data set in nuScenes format, read as columns and checked to fit together.

The tables are read directly, not through ``NuScenes(...)``: the devkit keeps every record as a dict for as long as it
lives and adds reverse indices, which takes many gigabytes for v1.0-trainval. Here tables become columns piece by piece.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from bevkd.errors import DataError, report

Kind = Literal["text", "texts", "whole", "flag", "vector3", "quaternion", "matrix3"]

FIELDS: Mapping[str, Mapping[str, Kind]] = {
    "attribute": {"token": "text", "name": "text"},
    "category": {"token": "text", "name": "text"},
    "instance": {"token": "text", "category_token": "text"},
    "sensor": {"token": "text", "channel": "text", "modality": "text"},
    "calibrated_sensor": {
        "token": "text",
        "sensor_token": "text",
        "translation": "vector3",
        "rotation": "quaternion",
        "camera_intrinsic": "matrix3",
    },
    "scene": {"token": "text", "name": "text"},
    "sample": {"token": "text", "scene_token": "text", "timestamp": "whole"},
    "ego_pose": {"token": "text", "translation": "vector3", "rotation": "quaternion"},
    "sample_data": {
        "token": "text",
        "sample_token": "text",
        "ego_pose_token": "text",
        "calibrated_sensor_token": "text",
        "timestamp": "whole",
        "is_key_frame": "flag",
        "width": "whole",
        "height": "whole",
        "filename": "text",
        "prev": "text",
    },
    "sample_annotation": {
        "token": "text",
        "sample_token": "text",
        "instance_token": "text",
        "attribute_tokens": "texts",
        "translation": "vector3",
        "size": "vector3",
        "rotation": "quaternion",
        "prev": "text",
        "next": "text",
        "num_lidar_pts": "whole",
        "num_radar_pts": "whole",
    },
}
"""Tables and fields that bevkd reads; everything else in the tables is ignored."""

LINKS: Mapping[tuple[str, str], str] = {
    ("instance", "category_token"): "category",
    ("calibrated_sensor", "sensor_token"): "sensor",
    ("sample", "scene_token"): "scene",
    ("sample_data", "sample_token"): "sample",
    ("sample_data", "ego_pose_token"): "ego_pose",
    ("sample_data", "calibrated_sensor_token"): "calibrated_sensor",
    ("sample_data", "prev"): "sample_data",
    ("sample_annotation", "sample_token"): "sample",
    ("sample_annotation", "instance_token"): "instance",
    ("sample_annotation", "prev"): "sample_annotation",
    ("sample_annotation", "next"): "sample_annotation",
}
"""Fields that name a record of a table; an empty ``prev`` or ``next`` names none."""

NONE = -1
"""Row number of a link that names no record."""

SEVERAL = -2
"""Attribute of an annotation that has more than one."""

Column = list[Any] | npt.NDArray[Any]


@dataclass(frozen=True)
class Tables:
    """All tables of one version.

    Attributes:
        columns: table name to field name to its values: a list of texts, or an array with a row per record.
        rows: for each link its target's row numbers, ``NONE`` where it names no record.
        attributes: row of each annotation's attribute, ``NONE`` if it has none, ``SEVERAL`` if several.
    """

    columns: Mapping[str, Mapping[str, Column]]
    rows: Mapping[tuple[str, str], npt.NDArray[np.int64]]
    attributes: npt.NDArray[np.int64]

    def texts(self, table: str, field: str) -> list[str]:
        """Return a column of texts."""
        return list(self.columns[table][field])

    def array(self, table: str, field: str) -> npt.NDArray[Any]:
        """Return a column of numbers, a row per record."""
        return np.asarray(self.columns[table][field])

    def count(self, table: str) -> int:
        """Return the number of records of a table."""
        return len(self.columns[table]["token"])


def content_digest(folder: Path) -> str:
    """Return the SHA-256 over the bytes of all tables that bevkd reads.

    Raises:
        DataError: lists every table file that is missing or cannot be read.
    """
    total, faults = hashlib.sha256(), []
    for name in FIELDS:
        try:
            with (folder / f"{name}.json").open("rb") as file:
                total.update(f"{name}:{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
        except OSError as error:
            faults.append(_unreadable(name, error))
    if faults:
        raise _misfit(folder, faults)
    return total.hexdigest()


def read_tables(folder: Path) -> Tables:
    """Return the tables in ``folder``.

    Raises:
        DataError: lists every file that is missing or is not JSON, every field that is absent or of the wrong kind,
            and every link to a record that does not exist.
    """
    faults: list[str] = []
    columns = {name: _read_table(folder, name, fields, faults) for name, fields in FIELDS.items()}
    numbers = {
        name: {token: row for row, token in enumerate(table["token"])} for name, table in columns.items() if table
    }
    for name, rows in numbers.items():
        if len(rows) < len(columns[name]["token"]):
            faults.append(f"{name}.json: {len(columns[name]['token']) - len(rows)} token(s) stand there twice")
    links = {}
    for (name, field), target in LINKS.items():
        if name in numbers and target in numbers:
            links[name, field] = _follow(columns[name][field], numbers[target], (name, field, target), faults)
    attributes = np.zeros(0, dtype=np.int64)
    if "sample_annotation" in numbers and "attribute" in numbers:
        lists = columns["sample_annotation"]["attribute_tokens"]
        first = [tokens[0] if tokens else "" for tokens in lists]
        where = ("sample_annotation", "attribute_tokens", "attribute")
        attributes = _follow(first, numbers["attribute"], where, faults)
        attributes[[row for row, tokens in enumerate(lists) if len(tokens) > 1]] = SEVERAL
    if faults:
        raise _misfit(folder, faults)
    return Tables(columns, links, attributes)


def _misfit(folder: Path, faults: list[str]) -> Exception:
    faults = [*faults, "To fix: extract the metadata archive of this version again, all tables together."]
    return report(DataError, f"the tables in {folder} cannot be used:", faults)


def _unreadable(name: str, error: OSError) -> str:
    return f"{name}.json: {'missing' if isinstance(error, FileNotFoundError) else error.strerror or error}"


def _read_table(folder: Path, name: str, fields: Mapping[str, Kind], faults: list[str]) -> dict[str, Column]:
    """Return the columns of a table; adds a fault for each field that is wrong and returns nothing then."""
    pieces: dict[str, list[Column]] = {field: [_column([], kind)] for field, kind in fields.items()}
    before, start = len(faults), 0
    try:
        for records in _chunks((folder / f"{name}.json").read_text(encoding="utf-8")):
            for field in list(pieces):
                try:
                    values = [record[field] for record in records]
                    pieces[field].append(_column(values, fields[field]))
                except (LookupError, TypeError, ValueError):
                    faults.append(f"{name}.json: {_first_fault(records, field, fields[field], start)}")
                    del pieces[field]  # one fault per field
            start += len(records)
    except OSError as error:
        faults.append(_unreadable(name, error))
    except ValueError as error:
        faults.append(f"{name}.json: is not a JSON list of records ({error})")
    if len(faults) > before:
        return {}
    return {field: _joined(parts) for field, parts in pieces.items()}


def _chunks(text: str, size: int = 20_000) -> Iterator[list[dict[str, Any]]]:
    """Yield the records of a JSON list in chunks; raises ValueError if it is none.

    A record as a dict takes several times its place in columns, and the largest table has millions: never all at once.
    """
    decode = json.JSONDecoder().raw_decode
    records: list[dict[str, Any]] = []
    position = _skip_space(text, 0)
    if text[position : position + 1] != "[":
        raise ValueError("it does not begin with [")
    position = _skip_space(text, position + 1)
    while text[position : position + 1] != "]" or records:
        record, position = decode(text, position)
        if not isinstance(record, dict):
            raise ValueError(f"it holds a {type(record).__name__}")
        records.append(record)
        position = _skip_space(text, position)
        last = text[position : position + 1] != ","
        if last or len(records) == size:
            yield records
            records = []
        if last:
            break
        position = _skip_space(text, position + 1)
    if text[position : position + 1] != "]" or _skip_space(text, position + 1) < len(text):
        raise ValueError(f"it does not go on as a list at character {position}")


def records(folder: Path, name: str) -> Iterator[dict[str, Any]]:
    """Yield the records of one table, whatever its fields.

    Raises:
        DataError: the file is missing, or is not a JSON list of records.
    """
    try:
        for chunk in _chunks((folder / f"{name}.json").read_text(encoding="utf-8")):
            yield from chunk
    except OSError as error:
        raise _misfit(folder, [_unreadable(name, error)]) from error
    except ValueError as error:
        raise _misfit(folder, [f"{name}.json: is not a JSON list of records ({error})"]) from error


def _skip_space(text: str, position: int) -> int:
    while text[position : position + 1].isspace():
        position += 1
    return position


_MEANING: Mapping[Kind, str] = {
    "text": "a text",
    "texts": "a list of texts",
    "whole": "a whole number",
    "flag": "true or false",
    "vector3": "three finite numbers",
    "quaternion": "a quaternion (four finite numbers, not all zero)",
    "matrix3": "a 3 x 3 matrix or empty",
}
_SHAPES: Mapping[Kind, tuple[int, ...]] = {"vector3": (3,), "quaternion": (4,), "matrix3": (3, 3)}


def _column(values: list[Any], kind: Kind) -> Column:
    """Return the values as a list of texts or an array; raises TypeError or ValueError if one is not of ``kind``."""
    if kind in ("text", "texts"):
        fine = (isinstance(value, str) if kind == "text" else _is_texts(value) for value in values)
        if not all(fine):
            raise TypeError(kind)
        return values
    if kind in ("flag", "whole"):
        wanted = bool if kind == "flag" else int
        if not all(type(value) is wanted for value in values):
            raise TypeError(kind)
        return np.array(values, dtype=np.bool_ if kind == "flag" else np.int64)
    if kind == "matrix3":
        values = [value if value else np.zeros((3, 3)) for value in values]
    array = np.array(values, dtype=np.float64).reshape(len(values), *_SHAPES[kind])
    if not np.isfinite(array).all() or (kind == "quaternion" and (np.linalg.norm(array, axis=1) < 1e-6).any()):
        raise ValueError(kind)
    return array


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _joined(parts: list[Column]) -> Column:
    arrays = [part for part in parts if isinstance(part, np.ndarray)]
    return np.concatenate(arrays) if arrays else [value for part in parts for value in part]


def _first_fault(records: list[dict[str, Any]], field: str, kind: Kind, start: int) -> str:
    """Return what is wrong with the first record whose ``field`` is missing or not of ``kind``."""
    for row, record in enumerate(records, start):
        if field not in record:
            return f"record {row} has no '{field}'"
        try:
            _column([record[field]], kind)
        except (TypeError, ValueError):
            return f"'{field}' of record {row} is not {_MEANING[kind]}, it is {record[field]!r}"
    raise AssertionError("only called when a record is wrong")


def _follow(
    tokens: Iterable[str], rows: Mapping[str, int], where: tuple[str, str, str], faults: list[str]
) -> npt.NDArray[np.int64]:
    """Return the row of each token; adds one fault if some are in no record of the target."""
    name, field, target = where
    optional = field in ("prev", "next", "attribute_tokens")
    dangling = [token for token in tokens if token not in rows and not (optional and token == "")]
    if dangling:
        faults.append(
            f"{name}.json: {len(dangling)} '{field}' name no record of {target}.json, first is '{dangling[0]}'"
        )
    return np.fromiter((rows.get(token, NONE) for token in tokens), dtype=np.int64)
