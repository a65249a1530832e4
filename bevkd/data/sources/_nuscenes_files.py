"""Sensor files of nuScenes: reading point clouds, and telling whether files are whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from bevkd.data.sources import _files
from bevkd.errors import DataError

LIDAR_RECORD_BYTES = 20
"""One LiDAR return: x, y, z (m), intensity (0-255), ring, each a float32."""

NEAR_M = 1.0
"""Returns with |x| and |y| below this are the car itself."""

_RADAR_TYPES = {
    ("F", 4): "<f4",
    ("F", 8): "<f8",
    ("I", 1): "<i1",
    ("I", 2): "<i2",
    ("I", 4): "<i4",
    ("U", 1): "<u1",
    ("U", 2): "<u2",
    ("U", 4): "<u4",
}


def read_lidar(path: Path) -> npt.NDArray[np.float32]:
    """Return x, y, z (sensor frame, m) and intensity (0-255) of the returns beyond the car, ``[P, 4]``.

    Raises:
        DataError: the file is missing or truncated.
    """
    fault = file_fault(path)
    if fault:
        raise DataError(f"{path}: {fault}. Download it again, or leave its frame out (skip_missing: true).")
    points: npt.NDArray[np.float32] = np.fromfile(path, dtype=np.float32).reshape(-1, 5)[:, :4]
    return _beyond_car(points)


def read_radar(path: Path) -> npt.NDArray[np.float32]:
    """Return x, y, z (sensor frame, m), compensated velocity (vx, vy, m/s) and cross section (dBsm), ``[R, 6]``.

    Keeps what the devkit keeps by default: valid, unambiguous returns that are not flagged as stopped (7).

    Raises:
        DataError: the file is missing, truncated or no binary PCD file.
    """
    try:
        table = _read_pcd(path.read_bytes())
        if len(table) and np.isnan([table[name][0] for name in table.dtype.names or ()]).any():
            table = table[:0]  # how nuScenes writes a scan without returns
        kept = (table["invalid_state"] == 0) & (table["dyn_prop"] < 7) & (table["ambig_state"] == 3)
        columns = [table[name][kept] for name in ("x", "y", "z", "vx_comp", "vy_comp", "rcs")]
    except FileNotFoundError as error:
        raise DataError(f"no such radar file: {path}. Download it again, or leave its frame out.") from error
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path} is no whole radar file: {error}. Download it again.") from error
    points: npt.NDArray[np.float32] = np.stack(columns, axis=1).astype(np.float32)
    return _beyond_car(points)


def file_fault(path: Path) -> str | None:
    """Return what is wrong with a sensor file: missing, empty or truncated; None if it looks whole."""
    if not path.name.endswith(".pcd"):
        return _files.file_fault(path, LIDAR_RECORD_BYTES)
    try:
        content = path.read_bytes()
        if not content:
            return "is empty"
        _read_pcd(content)
        return None
    except FileNotFoundError:
        return "missing"
    except (OSError, ValueError) as error:
        return f"cannot be read ({error})"


def file_faults(root: Path, files: list[str]) -> dict[str, str]:
    """Return the fault of each of ``files`` (relative to ``root``) that has one."""
    return _files.file_faults(root, files, file_fault)


def _beyond_car(points: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    beyond: npt.NDArray[np.float32] = points[(np.abs(points[:, :2]) >= NEAR_M).any(axis=1)]
    return beyond


def _read_pcd(content: bytes) -> npt.NDArray[np.void]:
    """Return the records of a binary PCD file; raises ValueError if it is none or is truncated."""
    head, found, body = content.partition(b"\nDATA binary\n")
    if not found:
        raise ValueError("no header of a binary PCD file")
    lines = (line.split() for line in head.decode("ascii", errors="replace").splitlines() if not line.startswith("#"))
    header = {words[0]: words[1:] for words in lines if words}
    try:
        kinds = zip(header["TYPE"], map(int, header["SIZE"]), strict=True)
        fields = list(zip(header["FIELDS"], [_RADAR_TYPES[kind] for kind in kinds], strict=True))
        count = int(header["WIDTH"][0]) * int(header["HEIGHT"][0])
        record = np.dtype(fields)
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(f"its header cannot be read ({error})") from error
    if len(body) < count * record.itemsize:
        raise ValueError(f"truncated: {len(body)} of {count * record.itemsize} bytes of returns")
    return np.frombuffer(body, dtype=record, count=count)
