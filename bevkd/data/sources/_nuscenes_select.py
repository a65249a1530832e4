"""Which key frames a recipe asks for, and which of them are labelled."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from bevkd.data.sources._labels import drawn, listed, some
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
    index: FrameIndex, tables: Path, split: str, scenes: Sequence[str] | None, tokens: Sequence[str] | None
) -> list[int]:
    """Return the rows of the split's key frames, narrowed to ``scenes`` and to ``tokens``, in the index's order.

    Raises:
        DataError: the split, a scene or a token is unknown, or nothing is left.
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
    numbers = {number for number, name in enumerate(names) if name in set(chosen)}
    rows = [row for row, scene in enumerate(index["frame_scene"].tolist()) if scene in numbers]
    if tokens is not None:
        rows = _narrow(index, rows, tokens, split)
    if not rows:
        raise DataError(f"no key frame is left of split '{split}' in {tables}. Widen 'scenes' or 'tokens'.")
    return rows


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
    unknown = [token for token in tokens if token not in index.frame_rows]
    outside = [token for token in tokens if token in index.frame_rows and index.frame_rows[token] not in inside]
    repeated = [token for token, count in Counter(tokens).items() if count > 1]
    faults = [f"'{token}' is in no record of sample.json" for token in unknown]
    for token in outside:
        scene = index.meta["scenes"][index["frame_scene"][index.frame_rows[token]]]
        faults.append(f"'{token}' belongs to {scene}, which split '{split}' (narrowed by 'scenes') leaves out")
    faults += [f"'{token}' stands there more than once" for token in repeated]
    if faults:
        raise report(DataError, "'tokens' cannot be selected; correct the list, the split or 'scenes':", faults)
    return sorted(index.frame_rows[token] for token in tokens)


def select_labelled(
    index: FrameIndex, rows: Sequence[int], labels: float | Sequence[str] | Path, seed: int
) -> frozenset[str]:
    """Return the tokens of ``rows`` that are labelled.

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
