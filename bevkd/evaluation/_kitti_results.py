"""Result folders of KITTI: one text file per frame, written from boxes, read and checked from users."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from bevkd.data.sources._kitti_boxes import boxes_from_objects, objects_from_boxes
from bevkd.data.sources._kitti_files import Objects, format_results, read_objects
from bevkd.data.sources.kitti import CAMERA, CLASSES, KittiSource
from bevkd.errors import ContractError, DataError, report
from bevkd.evaluation.score import shortened
from bevkd.types import Boxes


def to_results(source: KittiSource, found: Mapping[str, Boxes]) -> dict[str, Objects]:
    """Return boxes as KITTI results; those that image 2 does not show are left out, as nothing is labelled there.

    Args:
        source: gives classes, calibrations and image sizes.
        found: boxes in the BEV frame by token; velocities are ignored.

    Raises:
        ContractError: lists every frame with a value that is not finite, a size that is not positive, or a label
            outside the source's classes.
        DataError: a token is unknown.
    """
    faults = [f"{token}: {fault}" for token, boxes in found.items() for fault in _faults(source, boxes)]
    if faults:
        raise report(ContractError, "these predictions cannot be scored:", shortened(faults))
    return {
        token: objects_from_boxes(boxes, source.classes, source.calibration(token), source.image_sizes(token)[CAMERA])
        for token, boxes in found.items()
    }


def to_boxes(source: KittiSource, detections: Mapping[str, Objects], tokens: Sequence[str]) -> dict[str, Boxes]:
    """Return what :func:`load_detections` has of ``tokens`` as boxes in the BEV frame; the inverse of `to_results`.

    Boxes of classes that ``source`` does not have are left out.
    """
    return {token: _boxes(source, token, detections[token]) for token in tokens}


def write_results(folder: Path, results: Mapping[str, Objects]) -> None:
    """Write ``<token>.txt`` for each frame; what stood in ``folder`` before is replaced."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    for token, objects in results.items():
        (temporary / f"{token}.txt").write_text(format_results(objects), encoding="ascii")
    if folder.exists():
        shutil.rmtree(folder)
    temporary.replace(folder)


def load_detections(path: Path, source: KittiSource) -> dict[str, Objects]:
    """Return a user's folder of result files after checking that it answers for the frames of ``source``.

    Raises:
        ContractError: lists all faults: no folder, frames without a file, malformed lines, unknown classes.
    """
    if not path.is_dir():
        raise ContractError(f"{path} is no folder. KITTI results are a folder with a text file per frame.")
    results, faults = {}, []
    missing = [token for token in source.tokens if not (path / f"{token}.txt").is_file()]
    if missing:
        total = len(source.tokens)
        faults.append(
            f"{len(missing)} of {total} frames have no file, first {missing[0]}.txt; an empty file is none found"
        )
    for token in sorted(set(source.tokens).difference(missing)):
        try:
            results[token] = read_objects(path / f"{token}.txt", scored=True)
        except DataError as error:
            faults.append(str(error))
            continue
        faults += [f"{token}.txt: {fault}" for fault in _object_faults(results[token])]
    if faults:
        raise report(ContractError, f"{path} cannot be scored:", shortened(faults))
    return results


def _boxes(source: KittiSource, token: str, objects: Objects) -> Boxes:
    known = objects[np.array([name in source.classes for name in objects.names], dtype=np.bool_)]
    labels = np.array([source.classes.index(name) for name in known.names], dtype=np.float64)
    return boxes_from_objects(known, labels, source.calibration(token))


def _faults(source: KittiSource, boxes: Boxes) -> list[str]:
    values, count = boxes.pack()[:, [0, 1, 2, 3, 4, 5, 6, 9]], len(boxes)
    broken = int((~values.isfinite()).any(dim=1).sum())
    flat = int((boxes.size <= 0).any(dim=1).sum())
    foreign = int(((boxes.labels < 0) | (boxes.labels >= len(source.classes))).sum())
    faults = [f"{broken} of {count} boxes have values that are not finite"] if broken else []
    faults += [f"{flat} of {count} boxes have a size that is not positive"] if flat else []
    faults += [f"{foreign} of {count} boxes have a label outside the {len(source.classes)} classes"] if foreign else []
    return faults


def _object_faults(objects: Objects) -> list[str]:
    unknown = sorted({name for name in objects.names if name not in CLASSES})
    flat = int((objects.sizes <= 0).any(axis=1).sum())
    faults = [f"no class of KITTI: {', '.join(unknown)}"] if unknown else []
    return [*faults, f"{flat} of {len(objects)} sizes are not positive"] if flat else faults
