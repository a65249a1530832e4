"""Which arrays hold a signal: shapes, types, meaning. Imports neither torch nor numpy, so that looking is quick.

Shape letters as in ``bevkd.types``; F the fields of a packed row, R rows of a mask.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from bevkd.cache.spec import CacheSpec, SignalSpec
from bevkd.errors import CacheSpecError
from bevkd.signals import BOX_FIELDS, FROM_DATA, MAPS, POINTS

LOGIT_LIMIT = 12.0
LOGIT_FLOOR = math.log(0.001 / 0.999)
LOGIT_STEP = (LOGIT_LIMIT - LOGIT_FLOOR) / 254
"""Of ``logit8``, the heatmap encoding of bevkd 0.1."""

LOGIT_CUT = 18.5
"""Logits beyond are cut by ``logits``: losses cut probabilities to 1e-4, UniDistill that of half the logit."""

BOX_ROW = (*BOX_FIELDS, "score", "label")
POINT_BOX_ROW = BOX_FIELDS[:7]
DEPTH_ROW = ("camera", "u", "v", "depth")
DEPTH_PER_PIXEL, DEPTH_PER_METRE = 4, 64
"""Steps in which ``depth`` stores image positions and depths; 16 bits reach 16383 pixels and 1023 m."""
INSTANCE_ROW = ("camera", "left", "top", "right", "bottom", "score", "label")

_TYPES = {
    "float16": "float16",
    "sparse": "float16",
    "root8": "int8",
    "uint8": "uint8",
    "int8": "int8",
    "logits": "uint8",
    "logit8": "uint8",
}

_ITEM_BYTES = {"float32": 4, "int32": 4, "uint16": 2, "float16": 2, "uint8": 1, "int8": 1}


@dataclass(frozen=True)
class ArraySpec:
    """One stored array.

    Attributes:
        shape: shape of one sample; the stored array has the sample axis in front.
        dtype: numpy and Zarr name of the type.
        dims: names of the axes of one sample.
        meaning: how to turn the stored values into the signal, for readers without bevkd.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    dims: tuple[str, ...]
    meaning: str

    @property
    def nbytes(self) -> int:
        """Bytes of one sample before compression."""
        return math.prod(self.shape) * _ITEM_BYTES[self.dtype]


def arrays_for(signal: str, spec: SignalSpec, sample_shape: tuple[int, ...]) -> tuple[ArraySpec, ...]:
    """Return the arrays that hold ``signal``.

    Args:
        sample_shape: of a map [C,Y,X] or [T,10,Y,X], of points [9,C]; unused for boxes and instances.
    """
    if spec.encoding == "boxes":
        return _boxes(signal, spec)
    if spec.encoding == "masks":
        return _instances(signal, spec)
    if spec.encoding == "depth":
        return _depth(signal, spec)
    if signal in POINTS:
        return _points(signal, spec, sample_shape)
    return _map(signal, spec, sample_shape)


def all_arrays(spec: CacheSpec, sample_shapes: Mapping[str, tuple[int, ...]]) -> tuple[ArraySpec, ...]:
    """Return the arrays of a cache, ordered by signal name."""
    return tuple(
        array
        for signal in sorted(spec.signals)
        for array in arrays_for(signal, spec.signals[signal], sample_shapes.get(signal, ()))
    )


def sample_shapes_of(
    spec: CacheSpec, written: Mapping[str, tuple[int, ...]], teacher: str, reasons: Mapping[str, str] | None = None
) -> dict[str, tuple[int, ...]]:
    """Return the shape of one sample per map and point signal of ``spec``.

    Args:
        written: shape per map that the teacher writes ([C,Y,X]; ``box_code`` [T,10,Y,X]); a teacher that writes
            instances lists them with the shape ().
        teacher: its name, for messages.
        reasons: why it does not write a map, or boxes, by the name of the signal.

    Raises:
        CacheSpecError: the teacher does not write a map that ``spec`` stores or takes points from.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    faults = []
    for signal, stored in spec.signals.items():
        needed = {POINTS.get(signal, signal)} - ({"boxes", *FROM_DATA} - set(reasons or ()))
        needed |= {"heatmap"} if stored.encoding == "sparse" else set()
        if absent := sorted(needed - set(written)):
            why = "".join(f" ({reasons[name]})" for name in absent if reasons and name in reasons)
            faults.append(f"signals.{signal} needs {' and '.join(absent)}{why}")
        elif signal in POINTS:
            shapes[signal] = (9, written[POINTS[signal]][0])
        elif signal in MAPS:
            shapes[signal] = tuple(written[signal])
    if faults:
        raise CacheSpecError(
            f"spec '{spec.name}' does not fit teacher '{teacher}', which writes the maps "
            f"{', '.join(sorted(written)) or '(none)'}: {'; '.join(faults)}. Remove these signals from the spec, or "
            "use a teacher that writes them."
        )
    return shapes


def _map(signal: str, spec: SignalSpec, shape: tuple[int, ...]) -> tuple[ArraySpec, ...]:
    dims = (*(("task", "code") if len(shape) == 4 else ("channel",)), "y", "x")
    main = ArraySpec(signal, shape, _TYPES[spec.encoding], dims, _meaning(signal, spec))
    if spec.encoding in ("float16", "logit8"):
        return (main,)
    if spec.encoding == "sparse":
        bits = (shape[-2], math.ceil(shape[-1] / 8))
        meaning = f"bit x of row y, highest bit first: {signal} is known at cell (y, x); elsewhere it is stored as 0"
        return (main, ArraySpec(f"{signal}_known", bits, "uint8", ("y", "x_by_8"), meaning))
    scale = ArraySpec(f"{signal}_scale", shape[:-2], "float32", dims[:-2], f"value of level 1 of {signal}")
    if spec.encoding == "logits":
        offset = ArraySpec(f"{signal}_offset", shape[:-2], "float32", dims[:-2], f"value of level 0 of {signal}")
        return (main, offset, scale)
    return (main, scale)


def _meaning(signal: str, spec: SignalSpec) -> str:
    if spec.encoding in ("float16", "sparse"):
        return f"{signal} as it is"
    if spec.encoding == "root8":
        return f"{signal} * abs({signal}) * {signal}_scale[..., None, None], in floating point"
    if spec.encoding == "logit8":
        return f"level 0: logit {-LOGIT_LIMIT}; level k: logit {LOGIT_FLOOR!r} + (k - 1) * {LOGIT_STEP!r}"
    if spec.encoding == "logits":
        return f"{signal} * {signal}_scale[..., None, None] + {signal}_offset[..., None, None]"
    return f"{signal} * {signal}_scale[..., None, None]"


def _boxes(signal: str, spec: SignalSpec) -> tuple[ArraySpec, ...]:
    meaning = f"fields: {', '.join(BOX_ROW)}; m, rad, m/s"
    return (
        ArraySpec(signal, (spec.capacity, len(BOX_ROW)), "float32", ("box", "field"), meaning),
        _count(signal, f"the first {signal}_count rows of {signal} are boxes"),
    )


def _count(signal: str, meaning: str) -> ArraySpec:
    return ArraySpec(f"{signal}_count", (), "int32", (), meaning)


def _points(signal: str, spec: SignalSpec, shape: tuple[int, ...]) -> tuple[ArraySpec, ...]:
    rows = f"the first {signal}_count rows are boxes"
    fields = f"fields: {', '.join(POINT_BOX_ROW)}; m, rad; {rows}"
    dims = ("box", "point", "channel")
    scaled = spec.encoding != "float16"
    meaning = f"{signal} * abs({signal}) * {signal}_scale[..., None]" if scaled else f"{signal} as it is"
    arrays = [
        ArraySpec(signal, (spec.capacity, *shape), _TYPES[spec.encoding], dims, f"{meaning}; {rows}"),
        ArraySpec(f"{signal}_boxes", (spec.capacity, len(POINT_BOX_ROW)), "float32", ("box", "field"), fields),
        _count(signal, f"number of boxes of {signal}"),
    ]
    if scaled:
        arrays.append(
            ArraySpec(
                f"{signal}_scale", (spec.capacity, shape[0]), "float32", dims[:2], f"value of level 1 of {signal}"
            )
        )
    return tuple(arrays)


def _instances(signal: str, spec: SignalSpec) -> tuple[ArraySpec, ...]:
    size = spec.resolution
    bits = f"bit c of row r, highest bit first: the mask at row r and column c of {size} x {size} cells over the box"
    fields = f"fields: {', '.join(INSTANCE_ROW)}; pixels of the original image; the first {signal}_count rows count"
    return (
        ArraySpec(signal, (spec.capacity, size, size // 8), "uint8", ("instance", "row", "column_by_8"), bits),
        _count(signal, f"number of instances of {signal}"),
        ArraySpec(f"{signal}_fields", (spec.capacity, len(INSTANCE_ROW)), "float32", ("instance", "field"), fields),
    )


def _depth(signal: str, spec: SignalSpec) -> tuple[ArraySpec, ...]:
    meaning = (
        f"fields: {', '.join(DEPTH_ROW)}, each the difference to the row before, modulo 65536; u and v in "
        f"1/{DEPTH_PER_PIXEL} pixel of the original image, depth in 1/{DEPTH_PER_METRE} m; field by field"
    )
    return (
        ArraySpec(signal, (len(DEPTH_ROW), spec.capacity), "uint16", ("field", "return"), meaning),
        _count(signal, f"the first {signal}_count columns of {signal} count"),
    )
