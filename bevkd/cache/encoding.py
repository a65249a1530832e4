"""Signals to stored arrays and back.

Encoding runs in numpy with a fixed order of summation, so that the same input gives the same bytes on every run.
Decoding runs in torch on any device. Shape letters as in ``bevkd.types``; F the fields of a packed box.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from bevkd.cache import ragged
from bevkd.cache.arrays import LOGIT_FLOOR, LOGIT_LIMIT, LOGIT_STEP
from bevkd.cache.quantise import Array, Encoded, Quantised, quantise
from bevkd.cache.spec import SignalSpec
from bevkd.cache.statistics import FEATURES, ChannelSums
from bevkd.errors import CacheError
from bevkd.signals import POINTS
from bevkd.types import Boxes, BoxPoints, Instances, LidarDepth, SparseMap

__all__ = ["Array", "Decoded", "Encoded", "Value", "decode", "encode", "shape_of"]

Value = Tensor | Array | Boxes | SparseMap | BoxPoints | Instances | LidarDepth
"""A signal of one sample: a map (torch or numpy), or what else a signal is."""

Decoded = (
    Float[Tensor, "B ..."]
    | SparseMap
    | tuple[Boxes, ...]
    | tuple[BoxPoints, ...]
    | tuple[Instances, ...]
    | tuple[LidarDepth, ...]
)
"""A signal of a batch."""


def encode(signal: str, spec: SignalSpec, value: Value, token: str) -> Encoded:
    """Return one sample of a signal as stored arrays, with the error that storing makes.

    Args:
        value: map [C,Y,X] or [T,10,Y,X]; for ``sparse`` one that says where it is known; boxes, points, instances.

    Raises:
        CacheError: a value of another kind, non-finite values, negative values in ``uint8``, more points than the
            capacity, or an error beyond ``spec.max_error``.
    """
    _check_kind(signal, spec, value, token)
    if isinstance(value, Boxes):
        encoded = ragged.encode_boxes(signal, spec, value, token)
    elif isinstance(value, Instances):
        encoded = ragged.encode_instances(signal, spec, value, token)
    elif isinstance(value, LidarDepth):
        encoded = ragged.encode_depth(signal, spec, value, token)
    elif isinstance(value, BoxPoints):
        exact = _finite(signal, spec, value.values, token)
        encoded = ragged.encode_points(signal, spec, exact, _float32(value.boxes), token)
    elif isinstance(value, SparseMap):
        encoded = _encode_sparse(signal, spec, value, token)
    else:
        encoded = _encode_map(signal, spec, value, token)
    if not encoded.error <= spec.max_error:
        raise CacheError(
            f"{signal} of sample '{token}' would be stored as {spec.encoding} with an error of {encoded.error:.4g}, "
            f"allowed are {spec.max_error:.4g}. {_advice(signal, spec)}"
        )
    return encoded


def shape_of(value: Value) -> tuple[int, ...] | None:
    """Return the shape that a map has, or each box's points; None for boxes and instances."""
    if isinstance(value, Boxes | Instances | LidarDepth):
        return None
    if isinstance(value, BoxPoints):
        return tuple(value.values.shape[1:])
    return tuple(value.values.shape if isinstance(value, SparseMap) else value.shape)


def decode(signal: str, spec: SignalSpec, stored: Mapping[str, Tensor]) -> Decoded:
    """Return a batch of ``signal`` from its stored arrays, each with a batch axis in front, on their device.

    Maps come as float32, ``sparse`` ones with their known cells; anything else as one value per sample.
    """
    values = stored[signal]
    if spec.encoding == "boxes":
        return ragged.decode_boxes(signal, stored)
    if spec.encoding == "masks":
        return ragged.decode_instances(signal, stored)
    if spec.encoding == "depth":
        return ragged.decode_depth(signal, stored)
    if signal in POINTS:
        return ragged.decode_points(signal, stored)
    if spec.encoding == "float16":
        return values.float()
    if spec.encoding == "sparse":
        return SparseMap(values.float(), ragged.unpack_bits(stored[f"{signal}_known"], values.shape[-1]))
    if spec.encoding == "logit8":
        levels = values.float()
        return torch.where(levels == 0, -LOGIT_LIMIT, (levels - 1) * LOGIT_STEP + LOGIT_FLOOR)
    levels = values.float()
    if spec.encoding == "root8":
        levels.mul_(levels.abs())
    restored = levels.mul_(stored[f"{signal}_scale"][..., None, None])
    return restored.add_(stored[f"{signal}_offset"][..., None, None]) if spec.encoding == "logits" else restored


def _check_kind(signal: str, spec: SignalSpec, value: Value, token: str) -> None:
    kinds = {"boxes": Boxes, "masks": Instances, "sparse": SparseMap, "depth": LidarDepth}
    wanted: Any = BoxPoints if signal in POINTS else kinds.get(spec.encoding, Tensor | np.ndarray)
    if not isinstance(value, wanted):
        name = getattr(wanted, "__name__", "a map (Tensor or ndarray)")
        raise CacheError(
            f"{signal} of sample '{token}' is {type(value).__name__}, but signals.{signal}.encoding "
            f"'{spec.encoding}' stores {name}. bevkd.cache.sample.stored_signals makes the right kind."
        )


def _advice(signal: str, spec: SignalSpec) -> str:
    where = f"signals.{signal}"
    if spec.encoding == "masks":
        return f"Raise {where}.resolution or {where}.max_error."
    if spec.encoding in ("float16", "sparse"):
        return f"Raise {where}.max_error or rescale the teacher's output."
    finer = "root8" if spec.encoding in ("uint8", "int8") else "float16"
    return f"Set {where}.encoding: {finer}, or raise {where}.max_error."


def _float32(value: Tensor | Array) -> Array:
    if isinstance(value, Tensor):
        value = value.detach().to("cpu", torch.float32).numpy()
    return np.ascontiguousarray(value, dtype=np.float32)


def _finite(signal: str, spec: SignalSpec, value: Tensor | Array, token: str) -> Array:
    """Return a map or points as float32, of which ``spec`` can hold every value."""
    exact = _float32(value)
    if not np.isfinite(exact).all():
        raise CacheError(
            f"{signal} of sample '{token}' has {int((~np.isfinite(exact)).sum())} non-finite values. Check that the "
            "teacher's weights fit its architecture, and that it does not overflow in half precision."
        )
    if spec.encoding == "uint8" and exact.min(initial=0) < 0:
        raise CacheError(
            f"{signal} of sample '{token}' has negative values (lowest {exact.min():.4g}), which uint8 cannot hold. "
            f"Set signals.{signal}.encoding: int8."
        )
    return exact


def _quantise_map(signal: str, spec: SignalSpec, exact: Array) -> tuple[Quantised, dict[str, Array]]:
    """Return the quantised channels of a map, and the arrays that hold it."""
    found = quantise(spec.encoding, exact.reshape(-1, exact.shape[-2] * exact.shape[-1]), spec.levels)
    arrays = {signal: found.levels.reshape(exact.shape)}
    if spec.encoding not in ("float16", "logit8", "sparse"):
        arrays[f"{signal}_scale"] = found.scales.reshape(exact.shape[:-2])
    if spec.encoding == "logits":
        arrays[f"{signal}_offset"] = found.offsets.reshape(exact.shape[:-2])
    return found, arrays


def _encode_map(signal: str, spec: SignalSpec, value: Tensor | Array, token: str) -> Encoded:
    found, arrays = _quantise_map(signal, spec, _finite(signal, spec, value, token))
    sums = None
    if signal in FEATURES:
        levels = arrays[signal].view(f"u{arrays[signal].itemsize}")
        # Together the bits of all channels, but for the sign of a float, are zero in cells that hold nothing.
        bits = np.bitwise_or.reduce(levels, axis=0)
        filled = (bits << 1 if spec.encoding == "float16" else bits) != 0
        sums = sums_over(filled, found.sums, found.squares)
    return Encoded(arrays, found.error, found.cosine, sums)


def sums_over(filled: Array, sums: Array, squares: Array) -> ChannelSums:
    """Return the sums of one sample, of whose cells or points some are ``filled``."""
    return ChannelSums(
        positions=filled.size, filled=int(filled.sum()), sums=tuple(sums.tolist()), squares=tuple(squares.tolist())
    )


def _encode_sparse(signal: str, spec: SignalSpec, value: SparseMap, token: str) -> Encoded:
    known = value.known.cpu().numpy()
    exact = np.where(known, _finite(signal, spec, value.values, token), np.float32(0))
    found, arrays = _quantise_map(signal, spec, exact)
    return Encoded({**arrays, f"{signal}_known": np.packbits(known, axis=-1)}, found.error, found.cosine)
