"""The frame index: all that bevkd needs of the nuScenes tables, as memory-mapped arrays.

The tables of v1.0-trainval are gigabytes of JSON that take minutes to read, in every process that opens them.
The index is built from them once and afterwards opens in milliseconds; loader workers share its pages.

It lies in a cache folder under the SHA-256 of the tables' content, so that every copy of the same tables shares one
index and an edited table never meets an old one. Hashing gigabytes at each start would be slow, so a small file maps
(path, size, modification time) of the tables to that SHA-256; only when this key is new is the content read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from bevkd.data.sources._nuscenes_build import build_index
from bevkd.data.sources._nuscenes_tables import FIELDS, content_digest, read_tables
from bevkd.errors import DataError

FORMAT = 2
"""Raised whenever the arrays change their meaning; older indices are then left alone and never read."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FrameIndex:
    """Frames, sensor readings and annotations of one version.

    F frames by scene and time: key frames, and the LiDAR sweeps around them, which have no annotations. R readings, S
    channels, C calibrations, A annotations (those of a frame are neighbours, in table order). Row numbers are -1 where
    there is no record.

    Attributes:
        folder: where the arrays lie; all that is pickled.
        meta: ``channels`` (LIDAR_TOP, cameras, radars), ``modalities``, ``scenes``, ``categories``,
            ``detection_names`` (class of each category or None), ``attributes``, ``splits``, ``content_digest``,
            ``annotation_digest`` (SHA-256 over all key frames and their annotations).
        arrays: by name:
            ``frame_token`` [F] bytes, of a sweep its ``sample_data`` token; ``frame_scene`` [F]; ``frame_time`` [F] us;
            ``frame_step`` [F] LiDAR scans since the last key frame, which itself has 0; ``frame_reading`` [F S] rows of
            readings; ``frame_previous`` [F] the frame of the previous images; ``frame_boxes`` [F + 1] offsets into the
            annotations;
            ``reading_file`` [R] bytes, relative to the root; ``reading_time`` [R] us; ``reading_pose`` [R 7] ego pose;
            ``reading_calibration`` [R]; ``reading_size`` [R 2] (H, W) px; ``reading_previous`` [R];
            ``calibration_pose`` [C 7] sensor in the ego frame; ``calibration_intrinsics`` [C 3 3];
            ``box_global`` [A 12] translation 3, size (w, l, h), quaternion (w, x, y, z), velocity 2;
            ``box_lidar`` [A 9] as ``types.BOX_FIELDS``; ``box_category`` [A]; ``box_attribute`` [A];
            ``box_points`` [A 2] LiDAR and radar returns inside. A pose is translation 3 and quaternion 4.
    """

    folder: Path
    meta: Mapping[str, Any]
    arrays: Mapping[str, npt.NDArray[Any]]

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Return the index that lies in ``folder``, without reading its arrays."""
        meta = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        arrays = {name: np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r")) for name in meta["arrays"]}
        return cls(folder, meta, arrays)

    def __reduce__(self) -> tuple[Any, ...]:
        return FrameIndex.open, (self.folder,)

    def __getitem__(self, name: str) -> npt.NDArray[Any]:
        return self.arrays[name]

    @cached_property
    def key_rows(self) -> dict[str, int]:
        """Row of each sample token."""
        return self._rows(self.arrays["frame_step"] == 0)

    @cached_property
    def sweep_rows(self) -> dict[str, int]:
        """Row of each LiDAR sweep's ``sample_data`` token; there are many."""
        return self._rows(self.arrays["frame_step"] > 0)

    def row(self, token: str) -> int | None:
        """Return the row of a frame, key frame or sweep; None if there is none."""
        row = self.key_rows.get(token)
        return self.sweep_rows.get(token) if row is None else row

    def tokens(self, rows: Sequence[int]) -> tuple[str, ...]:
        """Return the tokens of frames."""
        return tuple(token.decode() for token in self.arrays["frame_token"][np.array(rows, dtype=np.int64)].tolist())

    def key_frames(self, rows: Sequence[int]) -> list[int]:
        """Return those of ``rows`` that are key frames."""
        own = np.array(rows, dtype=np.int64)
        keys: list[int] = own[self.arrays["frame_step"][own] == 0].tolist()
        return keys

    def _rows(self, chosen: npt.NDArray[np.bool_]) -> dict[str, int]:
        rows = np.flatnonzero(chosen)
        tokens = self.arrays["frame_token"][rows].tolist()
        return {token.decode(): row for token, row in zip(tokens, rows.tolist(), strict=True)}

    def channels(self, modality: str) -> tuple[tuple[int, str], ...]:
        """Return column in ``frame_reading`` and name of each channel of ``modality`` (lidar, camera, radar)."""
        pairs = enumerate(zip(self.meta["channels"], self.meta["modalities"], strict=True))
        return tuple((column, name) for column, (name, kind) in pairs if kind == modality)

    def sweeps(self, reading: int, count: int) -> list[int]:
        """Return up to ``count`` readings of a sensor, newest first, beginning with ``reading``."""
        chain: list[int] = []
        while reading >= 0 and len(chain) < count:
            chain.append(reading)
            reading = int(self.arrays["reading_previous"][reading])
        return chain

    def file(self, reading: int) -> str:
        """Return the file of a reading, relative to the data set's root."""
        return str(self.arrays["reading_file"][reading].decode())


def default_index_dir() -> Path:
    """Return the user's cache folder for frame indices."""
    if os.environ.get("XDG_CACHE_HOME"):
        base = Path(os.environ["XDG_CACHE_HOME"])
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    else:
        base = Path.home() / ".cache"
    return base / "bevkd" / "nuscenes"


def open_index(tables: Path, index_dir: Path | None = None) -> FrameIndex:
    """Return the index of the tables in the folder ``tables``, building it if ``index_dir`` does not hold it yet.

    Raises:
        DataError: the tables are incomplete or do not fit together, or ``index_dir`` cannot be written.
    """
    place = index_dir or default_index_dir()
    alias = place / f"tables-{_stat_key(tables)}.txt"
    with contextlib.suppress(OSError, ValueError, KeyError):
        return FrameIndex.open(place / alias.read_text(encoding="ascii"))
    try:
        place.mkdir(parents=True, exist_ok=True)
        with _lock(place / "lock"):
            name = f"frames-v{FORMAT}-{content_digest(tables)[:40]}"
            try:
                index = FrameIndex.open(place / name)
            except (OSError, ValueError, KeyError):  # not there yet, or a copy of it was interrupted
                _build(tables, place / name)
                index = FrameIndex.open(place / name)
            _write_text(alias, name)
        return index
    except OSError as error:
        raise DataError(
            f"the frame index of {tables} cannot be kept in {place}: {error}. "
            "Set index_dir to a folder that can be written."
        ) from error


def _stat_key(tables: Path) -> str:
    """Return a key that changes when a table file is replaced; raises DataError if one is missing."""
    try:
        stats = [(name, (tables / f"{name}.json").stat()) for name in FIELDS]
    except OSError:
        content_digest(tables)  # raises, and lists all of them
        raise
    facts = [FORMAT, str(tables.resolve()), *((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:40]


def _build(tables: Path, folder: Path) -> None:
    logger.info("building the frame index of %s (once per data set)", tables)
    arrays, meta = build_index(read_tables(tables))
    meta = {**meta, "format": FORMAT, "content_digest": content_digest(tables), "arrays": sorted(arrays)}
    staging = Path(tempfile.mkdtemp(prefix=".building-", dir=folder.parent))
    try:
        for name, array in arrays.items():
            np.save(staging / f"{name}.npy", array, allow_pickle=False)
        (staging / "index.json").write_text(json.dumps(meta), encoding="utf-8")
        staging.chmod(0o755)
        shutil.rmtree(folder, ignore_errors=True)
        staging.rename(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _write_text(path: Path, text: str) -> None:
    staging = path.with_name(f".{path.name}.{os.getpid()}")
    staging.write_text(text, encoding="ascii")
    staging.replace(path)


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Let one process at a time build: eight ranks that start together would need eight times the memory."""
    try:
        import fcntl
    except ImportError:  # Windows: building twice is slow, but each build is atomic
        yield
        return
    with path.open("w") as file:
        with contextlib.suppress(OSError):  # file systems without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
