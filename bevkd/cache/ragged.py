"""Signals with any number of rows per frame: boxes, points of boxes, instances.

Each is stored as ``capacity`` rows, the unused ones zero, which take next to no space, and their count.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Bool, UInt8
from torch import Tensor

from bevkd.cache.arrays import BOX_ROW, DEPTH_PER_METRE, DEPTH_PER_PIXEL, INSTANCE_ROW
from bevkd.cache.quantise import Array, Encoded, quantise
from bevkd.cache.spec import SignalSpec
from bevkd.errors import CacheError
from bevkd.geometry.masks import shrink, spread
from bevkd.types import Boxes, BoxPoints, Instances, LidarDepth


def encode_boxes(signal: str, spec: SignalSpec, boxes: Boxes, token: str) -> Encoded:
    """Return boxes as stored arrays: exact, but for those beyond capacity or under the lowest score.

    Raises:
        CacheError: a value is not finite; only a velocity may be NaN, which means unknown.
    """
    packed = boxes.pack().detach().to("cpu", torch.float32).numpy().reshape(-1, len(BOX_ROW))
    finite = np.isfinite(packed)
    velocity = [BOX_ROW.index("vx"), BOX_ROW.index("vy")]
    finite[:, velocity] |= np.isnan(packed[:, velocity])
    _check_finite(signal, "box", packed, finite, token)
    kept = packed[_best(packed[:, BOX_ROW.index("score")], spec)]
    return Encoded({signal: _padded(kept, spec.capacity), f"{signal}_count": _count(kept)}, 0.0, 1.0)


def decode_boxes(signal: str, stored: Mapping[str, Tensor]) -> tuple[Boxes, ...]:
    """Return the boxes of each sample."""
    counts = stored[f"{signal}_count"].tolist()
    return tuple(Boxes.unpack(rows[:count]) for rows, count in zip(stored[signal], counts, strict=True))


def encode_points(signal: str, spec: SignalSpec, values: Array, boxes: Array, token: str) -> Encoded:
    """Return points as stored arrays; ``root8`` has one scale per point.

    Args:
        values: finite [n,9,C] float32.
        boxes: [n,7] float32, see ``BoxPoints``.

    Raises:
        CacheError: there are more boxes than ``spec.capacity``.
    """
    count = len(values)
    if count > spec.capacity:
        raise CacheError(
            f"{signal} of sample '{token}' has {count} boxes, signals.{signal}.capacity is {spec.capacity}. Raise it; "
            "unused rows take next to no space."
        )
    _check_finite(signal, "box", boxes, np.isfinite(boxes), token)
    points = values.shape[1]
    found = quantise(spec.encoding, values.reshape(count * points, values.shape[2]), spec.levels)
    arrays = {
        signal: _padded(found.levels.reshape(values.shape), spec.capacity),
        f"{signal}_boxes": _padded(boxes, spec.capacity),
        f"{signal}_count": _count(values),
    }
    if spec.encoding != "float16":
        arrays[f"{signal}_scale"] = _padded(found.scales.reshape(count, points), spec.capacity)
    return Encoded(arrays, found.error, found.cosine)


def decode_points(signal: str, stored: Mapping[str, Tensor]) -> tuple[BoxPoints, ...]:
    """Return the points of each sample, as float32."""
    scales = stored.get(f"{signal}_scale")
    decoded = []
    for frame, count in enumerate(stored[f"{signal}_count"].tolist()):
        values = stored[signal][frame, :count].float()
        if scales is not None:
            values.mul_(values.abs()).mul_(scales[frame, :count, :, None])
        decoded.append(BoxPoints(stored[f"{signal}_boxes"][frame, :count], values))
    return tuple(decoded)


def encode_instances(signal: str, spec: SignalSpec, instances: Instances, token: str) -> Encoded:
    """Return instances as stored arrays: masks as bits on a grid over their box.

    The error is 1 - the mean IoU of the masks, at the resolution they came in.

    Raises:
        CacheError: a box or score is not finite, or a mask has no pixels.
    """
    fields = [instances.cameras[:, None], instances.boxes, instances.scores[:, None], instances.labels[:, None]]
    packed = torch.cat([field.detach().to("cpu", torch.float32) for field in fields], dim=1).numpy()
    _check_finite(signal, "instance", packed, np.isfinite(packed), token)
    kept = _best(packed[:, INSTANCE_ROW.index("score")], spec)
    size, overlap = spec.resolution, 0.0
    bits = np.zeros((len(kept), size, size // 8), np.uint8)
    for row, index in enumerate(kept.tolist()):
        exact = instances.masks[index].cpu()
        if not exact.numel():
            raise CacheError(
                f"{signal} of sample '{token}': the mask of instance {index} is {list(exact.shape)} pixels. Leave out "
                "instances without pixels in the teacher."
            )
        mask = shrink(exact, size, size)
        overlap += _iou(exact, spread(mask, *exact.shape)) / len(kept)
        bits[row] = np.packbits(mask.numpy(), axis=-1)
    arrays = {
        signal: _padded(bits, spec.capacity),
        f"{signal}_count": _count(kept),
        f"{signal}_fields": _padded(packed[kept], spec.capacity),
    }
    overlap = overlap if len(kept) else 1.0
    return Encoded(arrays, max(1 - overlap, 0.0), overlap)


def decode_instances(signal: str, stored: Mapping[str, Tensor]) -> tuple[Instances, ...]:
    """Return the instances of each sample; all masks have the same number of rows and columns."""
    decoded = []
    for frame, count in enumerate(stored[f"{signal}_count"].tolist()):
        camera, *box, score, label = stored[f"{signal}_fields"][frame, :count].unbind(-1)
        packed = stored[signal][frame, :count]
        masks = unpack_bits(packed, packed.shape[-1] * 8)
        decoded.append(
            Instances(camera.long(), torch.stack(box, dim=-1), label.round().long(), score, tuple(masks.unbind()))
        )
    return tuple(decoded)


_BAND_PX = 16
_DEPTH_STEPS = np.array([1, DEPTH_PER_PIXEL, DEPTH_PER_PIXEL, DEPTH_PER_METRE], np.float32)


def encode_depth(signal: str, spec: SignalSpec, depth: LidarDepth, token: str) -> Encoded:
    """Return LiDAR depths as stored arrays, ordered along bands of image rows, where neighbours have similar depths.

    The error is the relative L2 norm of the difference of the depths.

    Raises:
        CacheError: more returns than ``spec.capacity``, or values beyond what 16 bits hold.
    """
    fields = [depth.cameras[:, None], depth.pixels, depth.depth_m[:, None]]
    exact = torch.cat([field.detach().to("cpu", torch.float32) for field in fields], dim=1).numpy()
    if len(exact) > spec.capacity:
        raise CacheError(
            f"{signal} of sample '{token}' has {len(exact)} returns, signals.{signal}.capacity is {spec.capacity}. "
            "Raise it; unused columns take next to no space."
        )
    steps = np.rint(exact * _DEPTH_STEPS)
    _check_finite(signal, "return", exact, np.isfinite(exact) & (steps >= 0) & (steps < 2**16), token)
    order = np.lexsort((steps[:, 1], exact[:, 2] // _BAND_PX, steps[:, 0]))
    exact, stored = exact[order], steps[order].T.astype(np.uint16)
    error = np.linalg.norm(stored[3] / np.float32(DEPTH_PER_METRE) - exact[:, 3])
    norm = np.linalg.norm(exact[:, 3])
    padded = np.zeros((len(stored), spec.capacity), np.uint16)
    padded[:, : len(exact)] = np.diff(stored, axis=1, prepend=np.uint16(0))
    return Encoded({signal: padded, f"{signal}_count": _count(exact)}, float(error / norm) if norm else 0.0, 1.0)


def decode_depth(signal: str, stored: Mapping[str, Tensor]) -> tuple[LidarDepth, ...]:
    """Return the LiDAR depths of each sample, in pixels of the original images."""
    decoded = []
    for differences, count in zip(stored[signal], stored[f"{signal}_count"].tolist(), strict=True):
        camera, u, v, depth = differences[:, :count].int().cumsum(dim=1) % 2**16
        pixels = torch.stack([u, v], dim=1) / DEPTH_PER_PIXEL
        decoded.append(LidarDepth(camera.long(), pixels, depth / DEPTH_PER_METRE))
    return tuple(decoded)


def unpack_bits(packed: UInt8[Tensor, "*n bytes"], columns: int) -> Bool[Tensor, "*n columns"]:
    """Return the first ``columns`` bits of each row, highest bit first."""
    shifts = torch.arange(7, -1, -1, device=packed.device, dtype=torch.uint8)
    return ((packed[..., None] >> shifts) & 1).flatten(-2)[..., :columns].bool()


def _count(rows: Array) -> Array:
    return np.array(len(rows), np.int32)


def _padded(rows: Array, capacity: int) -> Array:
    stored = np.zeros((capacity, *rows.shape[1:]), rows.dtype)
    stored[: len(rows)] = rows
    return stored


def _best(scores: Array, spec: SignalSpec) -> Array:
    """Return the rows to keep, in their order: the highest scores within capacity, none under the lowest score."""
    kept = np.flatnonzero(scores >= spec.min_score)
    best = np.argsort(-scores[kept], kind="stable")[: spec.capacity]
    rows: Array = np.sort(kept[best])
    return rows


def _check_finite(signal: str, what: str, rows: Array, finite: Array, token: str) -> None:
    if not finite.all():
        bad = np.flatnonzero(~finite.all(axis=1))
        raise CacheError(
            f"{signal} of sample '{token}': {len(bad)} rows hold non-finite values, the first is {what} {bad[0]}: "
            f"{rows[bad[0]].tolist()}. Check that the teacher's weights fit its architecture."
        )


def _iou(left: Tensor, right: Tensor) -> float:
    union = int((left | right).sum())
    return int((left & right).sum()) / union if union else 1.0
