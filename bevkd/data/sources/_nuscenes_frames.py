"""The frames of the frame index: key frames, and the LiDAR sweeps around them with what other sensors saw then."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from bevkd.data.sources._nuscenes_tables import NONE, Tables

TOLERANCE_US = 50_000
"""A sweep frame has of each camera and radar the reading nearest in time, at most this far from its LiDAR sweep.

At 12 Hz the nearest image is 42 ms away at most, if none was lost."""

PREVIOUS_US = 500_000
"""How long before a sweep frame its previous images were taken, as near as there are some: as between key frames."""

_APART_US = 10_000_000

Ints = npt.NDArray[np.int64]
Arrays = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Readings:
    """The sensor readings of the index by time, R of them.

    Attributes:
        record: [R] row of each in ``sample_data``.
        row: [records + 1] row of each record of ``sample_data`` among the readings; the last entry answers for NONE.
        column: [R] number of its channel; the LiDAR is 0.
        channels: how many there are.
        cameras: [channels] which of them are cameras.
    """

    record: Ints
    row: Ints
    column: Ints
    channels: int
    cameras: npt.NDArray[np.bool_]


def frames_of(tables: Tables, readings: Readings) -> tuple[Arrays, Ints]:
    """Return key frames and sweep frames by scene and time, and the frame of each record of the ``sample`` table."""
    time = tables.array("sample_data", "timestamp")[readings.record]
    scene = tables.rows["sample", "scene_token"][tables.rows["sample_data", "sample_token"][readings.record]]
    key = tables.array("sample_data", "is_key_frame")[readings.record]
    place = _places(scene, time)
    sweeps = np.flatnonzero((readings.column == 0) & ~key)
    samples = tables.count("sample")

    reading = np.full((samples + len(sweeps), readings.channels), NONE, dtype=np.int32)
    reading[:samples] = _of_samples(tables, readings)
    for column in range(1, readings.channels):
        own = np.flatnonzero(readings.column == column)
        reading[samples:, column] = _nearest_reading(place, own, sweeps)
    reading[samples:, 0] = sweeps

    tokens = tables.texts("sample_data", "token")
    frame_token = [*tables.texts("sample", "token"), *(tokens[row] for row in readings.record[sweeps].tolist())]
    frame_scene = np.concatenate([tables.rows["sample", "scene_token"], scene[sweeps]])
    frame_time = np.concatenate([tables.array("sample", "timestamp"), time[sweeps]])
    is_key = np.arange(len(frame_token)) < samples
    order = np.lexsort((~is_key, frame_time, frame_scene))
    frame_of = np.empty(len(order), dtype=np.int64)
    frame_of[order] = np.arange(len(order))
    frames: Arrays = {
        "frame_token": bytes_of([frame_token[row] for row in order.tolist()]),
        "frame_scene": frame_scene[order].astype(np.int32),
        "frame_time": frame_time[order],
        "frame_reading": reading[order],
        "frame_step": _steps(frame_scene[order], is_key[order]).astype(np.int32),
    }
    frames["frame_previous"] = _previous(frames, readings.cameras).astype(np.int32)
    return frames, frame_of[:samples]


def bytes_of(texts: list[str]) -> npt.NDArray[np.bytes_]:
    """Return texts as an array of equally long byte strings."""
    return np.array([text.encode() for text in texts], dtype=np.bytes_)


def _of_samples(tables: Tables, readings: Readings) -> Ints:
    """Return the row of each sample's key reading of each channel."""
    found = np.full((tables.count("sample"), readings.channels), NONE, dtype=np.int64)
    sample = tables.rows["sample_data", "sample_token"]
    # In table order: of several key readings the devkit takes the last, too.
    records = np.flatnonzero(tables.array("sample_data", "is_key_frame") & (readings.row[:-1] != NONE))
    rows = readings.row[records]
    found[sample[records], readings.column[rows]] = rows
    return found


def _places(scene: Ints, time: Ints) -> Ints:
    """Return a number for each pair of scene and time in which scenes follow each other, far apart."""
    if not len(scene):
        return np.zeros(0, dtype=np.int64)
    first = np.full(int(scene.max()) + 1, np.iinfo(np.int64).max)
    np.minimum.at(first, scene, time)
    since = time - first[scene]
    places: Ints = scene * (since.max() + _APART_US) + since
    return places


def _nearest(places: Ints, wanted: Ints) -> Ints:
    """Return which of ``places``, which ascend, is nearest to each one wanted; of two as near the first."""
    after = np.searchsorted(places, wanted).clip(max=len(places) - 1)
    before = (after - 1).clip(min=0)
    found: Ints = np.where(wanted - places[before] <= np.abs(places[after] - wanted), before, after)
    return found


def _nearest_reading(place: Ints, own: Ints, sweeps: Ints) -> Ints:
    """Return which of the readings ``own`` is nearest to each of ``sweeps``, NONE where none is near enough."""
    if not len(own):
        return np.full(len(sweeps), NONE)
    own = own[np.argsort(place[own], kind="stable")]
    found = own[_nearest(place[own], place[sweeps])]
    near: Ints = np.where(np.abs(place[found] - place[sweeps]) <= TOLERANCE_US, found, NONE)
    return near


def _steps(scene: Ints, is_key: npt.NDArray[np.bool_]) -> Ints:
    """Return how many LiDAR scans after the last key frame, or after the scene's start, each frame is."""
    row = np.arange(len(scene))
    starts = np.concatenate([[True], scene[1:] != scene[:-1]])[: len(scene)]
    origin = np.where(is_key, row, np.where(starts, row - 1, -1))
    steps: Ints = row - np.maximum.accumulate(origin) if len(row) else row
    return steps


def _previous(frames: Arrays, cameras: npt.NDArray[np.bool_]) -> Ints:
    """Return the frame whose images are each frame's previous ones, itself where there is none before it in the scene.

    Of key frames that is the key frame before; of sweep frames the one with images of all cameras that is nearest to
    ``PREVIOUS_US`` before.
    """
    scene, row = frames["frame_scene"].astype(np.int64), np.arange(len(frames["frame_scene"]))
    previous = row.copy()
    keys = np.flatnonzero(frames["frame_step"] == 0)
    follows = scene[keys[1:]] == scene[keys[:-1]]
    previous[keys[1:][follows]] = keys[:-1][follows]
    sweeps = np.flatnonzero(frames["frame_step"])
    seen = np.flatnonzero((frames["frame_reading"][:, cameras] >= 0).all(axis=1))
    if len(seen) and len(sweeps):
        place = _places(scene, frames["frame_time"])
        found = seen[_nearest(place[seen], place[sweeps] - PREVIOUS_US)]
        before = (scene[found] == scene[sweeps]) & (found < sweeps)
        previous[sweeps[before]] = found[before]
    return previous
