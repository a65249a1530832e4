"""Which frames a recipe asks for, and which of them are labelled."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from bevkd.data.sources._labels import drawn, listed, some
from bevkd.data.sources._nuscenes_frames import TOLERANCE_US
from bevkd.data.sources._nuscenes_index import FrameIndex
from bevkd.errors import DataError, report

_VERSION_OF = {"train": "trainval", "val": "trainval", "train_detect": "trainval", "train_track": "trainval"}
_VERSION_OF |= {"mini_train": "mini", "mini_val": "mini", "test": "test"}


def check_folders(root: Path, version: str) -> Path:
    """Return the folder of the tables.

    Raises:
        DataError: it does not exist; names the versions that do.
    """
    tables = root / version
    if tables.is_dir():
        return tables
    if not root.is_dir():
        raise DataError(f"no such data set folder: {root}. Set root to the folder that holds samples/ and {version}/.")
    known = sorted(path.parent.name for path in root.glob("*/sample_data.json"))
    fix = f"Set version to one of: {', '.join(known)}." if known else "Set root to the folder that holds v1.0-*/."
    raise DataError(f"{root} holds no version '{version}'. {fix}")


def select_frames(
    index: FrameIndex,
    tables: Path,
    split: str,
    scenes: Sequence[str] | None,
    tokens: Sequence[str] | None,
    sweep_frames: int = 0,
) -> list[int]:
    """Return the rows of the split's frames, narrowed to ``scenes`` and to ``tokens``, in the index's order.

    Args:
        sweep_frames: take every n-th LiDAR sweep after each key frame, too; 0 takes key frames only.

    Raises:
        DataError: the split, a scene or a token is unknown, nothing is left, or there is no such sweep.
    """
    chosen = _scenes_of(index, tables, split)
    if scenes is not None:
        foreign = [name for name in scenes if name not in chosen]
        if foreign:
            raise DataError(
                f"scenes {some(foreign)} are not in split '{split}' of {tables}. "
                f"Its scenes there are {some(chosen, 10)}. Correct 'scenes' or choose another split."
            )
        chosen = [name for name in chosen if name in set(scenes)]
    names = index.meta["scenes"]
    numbers = [number for number, name in enumerate(names) if name in set(chosen)]
    inside, steps = np.isin(index["frame_scene"], numbers), index["frame_step"]
    wanted = steps % sweep_frames == 0 if sweep_frames else steps == 0
    rows: list[int] = np.flatnonzero(inside & wanted).tolist()
    if sweep_frames:
        _check_sweeps(index, rows, sweep_frames, int(steps[inside].max(initial=0)))
    if tokens is not None:
        rows = _narrow(index, rows, tokens, split)
    if not rows:
        raise DataError(f"no key frame is left of split '{split}' in {tables}. Widen 'scenes' or 'tokens'.")
    return rows


def _check_sweeps(index: FrameIndex, rows: Sequence[int], sweep_frames: int, most: int) -> None:
    """Refuse a choice that holds no sweep, and sweeps that cannot be told from key frames by their token."""
    if sweep_frames > most:
        there = f"at most {most} LiDAR sweeps follow a key frame" if most else "there are no sweeps between key frames"
        raise DataError(f"sweep_frames: {sweep_frames} takes no sweep, {there}. Lower it, or set it to 0.")
    own = np.array(rows, dtype=np.int64)
    sweeps = own[index["frame_step"][own] > 0]
    for token in index["frame_token"][sweeps].tolist():
        if token.decode() in index.key_rows:
            raise DataError(
                f"'{token.decode()}' is the token of a sample and of a LiDAR sweep, so that neither could be asked "
                "for. Write the tables with tokens of their own, or set sweep_frames: 0."
            )


def with_readings(index: FrameIndex, rows: Sequence[int], modalities: Collection[str]) -> list[int]:
    """Return ``rows`` without the sweep frames that lack a reading of a camera or radar.

    Args:
        modalities: ``camera`` and ``radar``, as far as they will be loaded.

    Raises:
        DataError: all sweep frames lack one.
    """
    columns = [column for modality in sorted(modalities) for column, _ in index.channels(modality)]
    own = np.array(rows, dtype=np.int64)
    sweep = index["frame_step"][own] > 0
    whole = (index["frame_reading"][own][:, columns] >= 0).all(axis=1)
    if sweep.any() and not (sweep & whole).any():
        raise DataError(
            f"none of the {sweep.sum()} sweep frames has a reading of every {' and every '.join(sorted(modalities))} "
            f"within {TOLERANCE_US // 1000} ms: does the data set record them at key frames only? Set sweep_frames: 0."
        )
    kept: list[int] = own[whole | ~sweep].tolist()
    return kept


def frame_notes(index: FrameIndex, rows: Sequence[int], lacking: int, split: str) -> tuple[str, ...]:
    """Return what to tell users about ``rows``; nothing if they are key frames only.

    Args:
        lacking: sweep frames that :func:`with_readings` left out.
    """
    keys = len(index.key_frames(rows))
    if keys == len(rows):
        return ()
    counts = f"{keys:,} key frames and {len(rows) - keys:,} sweep frames of {split}"
    limit = f"a sensor has no reading within {TOLERANCE_US // 1000} ms"
    return (counts, f"{lacking:,} sweep frames left out: {limit}") if lacking else (counts,)


def _scenes_of(index: FrameIndex, tables: Path, split: str) -> list[str]:
    official: dict[str, list[str]] = index.meta["splits"]
    present = set(index.meta["scenes"])
    custom = custom_splits(tables)
    if split in official:
        kinds = [kind for kind in ("trainval", "mini", "test") if tables.name.endswith(kind)]
        if kinds and kinds[0] != _VERSION_OF.get(split, kinds[0]):
            raise DataError(
                f"split '{split}' belongs to version v1.0-{_VERSION_OF[split]}, version is {tables.name}. "
                f"Splits with scenes there: {_splits_here(index, custom, kinds[0])}."
            )
        chosen = [name for name in official[split] if name in present]
    elif split in custom:
        chosen = custom[split]
        unknown = [name for name in chosen if name not in present]
        if unknown:
            raise DataError(
                f"split '{split}' in {tables / 'splits.json'} names scenes {some(unknown)}, which are not in "
                "scene.json. Correct splits.json."
            )
    else:
        raise DataError(
            f"unknown split '{split}'. Splits with scenes in {tables}: {_splits_here(index, custom)}. "
            f"To add a split of your own, write it to {tables / 'splits.json'} as {{name: [scene names]}}."
        )
    if not chosen:
        raise DataError(
            f"split '{split}' has no scene in {tables}. Splits with scenes there: {_splits_here(index, custom)}."
        )
    return chosen


def custom_splits(tables: Path) -> dict[str, list[str]]:
    path = tables / "splits.json"
    try:
        splits = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}. It must hold {{name: [scene names]}}.") from error
    listed = isinstance(splits, dict) and all(isinstance(names, list) for names in splits.values())
    if not listed or not all(isinstance(name, str) for names in splits.values() for name in names):
        raise DataError(f"{path} must hold {{name: [scene names]}}. Correct it.")
    return {name: list(names) for name, names in splits.items()}


def _splits_here(index: FrameIndex, custom: dict[str, list[str]], kind: str | None = None) -> str:
    present = set(index.meta["scenes"])
    fitting = {
        name: scenes for name, scenes in index.meta["splits"].items() if kind is None or _VERSION_OF.get(name) == kind
    }
    counts = {name: len(present.intersection(scenes)) for name, scenes in {**custom, **fitting}.items()}
    return ", ".join(f"{name} ({count} scenes)" for name, count in counts.items() if count) or "none"


def _narrow(index: FrameIndex, rows: list[int], tokens: Sequence[str], split: str) -> list[int]:
    inside = set(rows)
    row_of = {token: index.row(token) for token in tokens}
    repeated = [token for token, count in Counter(tokens).items() if count > 1]
    faults = []
    for token, row in row_of.items():
        if row is None:
            faults.append(f"'{token}' is in no record of sample.json")
        elif row not in inside:
            scene, step = index.meta["scenes"][index["frame_scene"][row]], int(index["frame_step"][row])
            faults.append(
                f"'{token}' is LiDAR sweep {step} after a key frame of {scene}: split or 'sweep_frames' leave it out"
                if step
                else f"'{token}' belongs to {scene}, which split '{split}' (narrowed by 'scenes') leaves out"
            )
    faults += [f"'{token}' stands there more than once" for token in repeated]
    if faults:
        raise report(DataError, "'tokens' cannot be selected; correct the list, the split or 'scenes':", faults)
    return sorted(row for row in row_of.values() if row is not None)


def select_labelled(
    index: FrameIndex, rows: Sequence[int], labels: float | Sequence[str] | Path, seed: int
) -> frozenset[str]:
    """Return the tokens of ``rows``, all of key frames, that are labelled.

    Args:
        labels: a fraction (whole scenes are drawn until it is reached, the same ones on every machine), scene names,
            or a file with one sample token per line.
        seed: changes the scenes that are drawn for a fraction.

    Raises:
        DataError: the file cannot be read, or a scene or token is not among ``rows``.
    """
    names, scene_of = index.meta["scenes"], index["frame_scene"]
    tokens: dict[str, list[str]] = {}
    for row in rows:
        tokens.setdefault(names[scene_of[row]], []).append(index["frame_token"][row].decode())
    if isinstance(labels, Path):
        return listed(labels, [token for group in tokens.values() for token in group])
    if isinstance(labels, float):
        return drawn(tokens, labels, seed)
    foreign = [name for name in labels if name not in tokens]
    if foreign:
        raise DataError(f"'labels' names scenes {some(foreign)}; the frames are of scenes {some(list(tokens), 10)}.")
    return frozenset(token for name in labels for token in tokens[name])
