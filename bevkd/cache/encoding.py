"""Signals to stored arrays and back.

Encoding runs in numpy with a fixed order of summation, so that the same input gives the same bytes on every run.
Decoding runs in torch on any device. Shape letters as in ``bevkd.types``; F the 11 fields of a packed box.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor

from bevkd.cache.spec import CacheSpec, SignalSpec
from bevkd.errors import CacheError
from bevkd.types import BOX_FIELDS, Boxes

Array = npt.NDArray[Any]
Value = Tensor | Array | Boxes
"""A signal of one sample: a map (torch or numpy) or boxes."""

LOGIT_LIMIT = 12.0
LOGIT_FLOOR = math.log(0.001 / 0.999)
LOGIT_STEP = (LOGIT_LIMIT - LOGIT_FLOOR) / 254
_TINY = float(np.finfo(np.float32).tiny)
_FIELDS = len(BOX_FIELDS) + 2
_SCORE = len(BOX_FIELDS)


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
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Encoded:
    """One sample of one signal as it is stored.

    Attributes:
        arrays: stored array per array name.
        error: relative L2 norm of the difference to the input; for ``logit8`` the largest difference of a probability.
        cosine: cosine similarity of input and stored values; 1 if both are all zero, 0 if one is.
    """

    arrays: dict[str, Array]
    error: float
    cosine: float


def arrays_for(signal: str, spec: SignalSpec, sample_shape: tuple[int, ...]) -> tuple[ArraySpec, ...]:
    """Return the arrays that hold ``signal``; ``sample_shape`` is [C,Y,X], or [T,10,Y,X], and unused for boxes."""
    if spec.encoding == "boxes":
        fields = ", ".join((*BOX_FIELDS, "score", "label"))
        return (
            ArraySpec(signal, (spec.capacity, _FIELDS), "float32", ("box", "field"), f"fields: {fields}; m, rad, m/s"),
            ArraySpec(f"{signal}_count", (), "int32", (), f"the first {signal}_count rows of {signal} are boxes"),
        )
    dims = (*(("task", "code") if len(sample_shape) == 4 else ("channel",)), "y", "x")
    if spec.encoding == "float16":
        return (ArraySpec(signal, sample_shape, "float16", dims, f"{signal} as it is"),)
    if spec.encoding == "logit8":
        meaning = f"level 0: logit {-LOGIT_LIMIT}; level k: logit {LOGIT_FLOOR!r} + (k - 1) * {LOGIT_STEP!r}"
        return (ArraySpec(signal, sample_shape, "uint8", dims, meaning),)
    meaning = f"{signal} * {signal}_scale[..., None, None]"
    return (
        ArraySpec(signal, sample_shape, spec.encoding, dims, meaning),
        ArraySpec(f"{signal}_scale", sample_shape[:-2], "float32", dims[:-2], f"value of one level of {signal}"),
    )


def all_arrays(spec: CacheSpec, sample_shapes: Mapping[str, tuple[int, ...]]) -> tuple[ArraySpec, ...]:
    """Return the arrays of a cache, ordered by signal name."""
    return tuple(
        array
        for signal in sorted(spec.signals)
        for array in arrays_for(signal, spec.signals[signal], sample_shapes.get(signal, ()))
    )


def encode(signal: str, spec: SignalSpec, value: Value, token: str) -> Encoded:
    """Return ``value`` ([C,Y,X], [T,10,Y,X] or boxes) as stored arrays, with the error that storing makes.

    Raises:
        CacheError: non-finite values, negative values in ``uint8``, or an error beyond ``spec.max_error``.
    """
    if isinstance(value, Boxes) or spec.encoding == "boxes":
        if not isinstance(value, Boxes) or spec.encoding != "boxes":
            raise CacheError(
                f"{signal} of sample '{token}' is {type(value).__name__} but signals.{signal}.encoding is "
                f"'{spec.encoding}': boxes need the encoding 'boxes', maps any other."
            )
        return _encode_boxes(signal, spec, value, token)
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
    encoded = _encode_map(signal, spec, exact)
    if not encoded.error <= spec.max_error:
        advice = (
            f"Raise signals.{signal}.max_error or rescale the teacher's output."
            if spec.encoding == "float16"
            else f"Set signals.{signal}.encoding: float16, or raise signals.{signal}.max_error."
        )
        raise CacheError(
            f"{signal} of sample '{token}' would be stored as {spec.encoding} with an error of {encoded.error:.4g}, "
            f"allowed are {spec.max_error:.4g}. {advice}"
        )
    return encoded


def decode(signal: str, spec: SignalSpec, stored: Mapping[str, Tensor]) -> Float[Tensor, "B ..."] | tuple[Boxes, ...]:
    """Return a batch of ``signal`` from its stored arrays, each with a batch axis in front, on their device.

    Maps come as float32, boxes as one :class:`Boxes` per sample.
    """
    values = stored[signal]
    if spec.encoding == "boxes":
        counts = stored[f"{signal}_count"].tolist()
        return tuple(Boxes.unpack(rows[:count]) for rows, count in zip(values, counts, strict=True))
    if spec.encoding == "float16":
        return values.float()
    if spec.encoding == "logit8":
        levels = values.float()
        return torch.where(levels == 0, -LOGIT_LIMIT, (levels - 1) * LOGIT_STEP + LOGIT_FLOOR)
    return values.float().mul_(stored[f"{signal}_scale"][..., None, None])


def _float32(value: Tensor | Array) -> npt.NDArray[np.float32]:
    if isinstance(value, Tensor):
        value = value.detach().to("cpu", torch.float32).numpy()
    return np.ascontiguousarray(value, dtype=np.float32)


def _encode_map(signal: str, spec: SignalSpec, exact: npt.NDArray[np.float32]) -> Encoded:
    """Encode channel by channel: a channel fits the processor's cache, a map does not."""
    channels = exact.reshape(-1, exact.shape[-2] * exact.shape[-1])
    stored = np.empty(channels.shape, {"float16": "f2", "int8": "i1"}.get(spec.encoding, "u1"))
    scales = np.ones(len(channels), np.float32)
    squares = np.zeros(4)  # summed: input^2, stored^2, difference^2, input * stored
    worst = 0.0
    encode_channel = _CHANNEL_ENCODERS[spec.encoding]
    for index, channel in enumerate(channels):
        stored[index], scales[index], restored = encode_channel(channel)
        before, after = channel.astype(np.float64), restored.astype(np.float64)
        if spec.encoding == "logit8":
            before, after = _sigmoid(before), _sigmoid(after)
        difference = after - before
        worst = max(worst, float(np.abs(difference).max()))
        products = (before * before, after * after, difference * difference, before * after)
        squares += [product.sum() for product in products]
    arrays = {signal: stored.reshape(exact.shape)}
    if spec.encoding in ("uint8", "int8"):
        arrays[f"{signal}_scale"] = scales.reshape(exact.shape[:-2])
    input2, stored2, difference2, product = squares.tolist()
    norm = math.sqrt(input2) * math.sqrt(stored2)
    cosine = product / norm if norm > 0 else float(input2 == stored2)
    relative = math.sqrt(difference2 / input2) if input2 > 0 else 0.0
    return Encoded(arrays, worst if spec.encoding == "logit8" else relative, cosine)


def _sigmoid(logits: Array) -> Array:
    probability: Array = 1 / (1 + np.exp(-np.clip(logits, -30, 30)))
    return probability


def _float16_channel(channel: Array) -> tuple[Array, float, Array]:
    with np.errstate(over="ignore"):  # overflow becomes an infinite error, which is refused
        stored = channel.astype(np.float16)
    return stored, 1.0, stored.astype(np.float32)


def _scaled_channel(levels: int) -> Callable[[Array], tuple[Array, float, Array]]:
    """Return the encoder to ``[-levels, levels]`` in which no value other than zero becomes zero."""

    def encode_channel(channel: Array) -> tuple[Array, float, Array]:
        peak: float = np.abs(channel).max().item()
        if peak == 0:
            return channel, 0.0, channel
        scale = np.float32(max(peak / levels, _TINY))
        level = np.rint(channel / scale)
        lost = (level == 0) & (channel != 0)
        level[lost] = np.sign(channel[lost])
        return level, float(scale), level * scale

    return encode_channel


def _logit_channel(channel: Array) -> tuple[Array, float, Array]:
    level = np.rint((np.minimum(channel, np.float32(LOGIT_LIMIT)) - LOGIT_FLOOR) / LOGIT_STEP) + 1
    level[channel < LOGIT_FLOOR] = 0
    return level, 1.0, np.where(level == 0, np.float32(-LOGIT_LIMIT), (level - 1) * LOGIT_STEP + LOGIT_FLOOR)


_CHANNEL_ENCODERS: dict[str, Callable[[Array], tuple[Array, float, Array]]] = {
    "float16": _float16_channel,
    "uint8": _scaled_channel(255),
    "int8": _scaled_channel(127),
    "logit8": _logit_channel,
}


def _encode_boxes(signal: str, spec: SignalSpec, boxes: Boxes, token: str) -> Encoded:
    packed = boxes.pack().detach().to("cpu", torch.float32).numpy().reshape(-1, _FIELDS)
    finite = np.isfinite(packed)
    finite[:, 7:9] |= np.isnan(packed[:, 7:9])  # an unknown velocity is NaN
    if not finite.all():
        rows = np.flatnonzero(~finite.all(axis=1))
        raise CacheError(
            f"{signal} of sample '{token}': {len(rows)} boxes hold non-finite values, the first is box {rows[0]}: "
            f"{packed[rows[0]].tolist()}. Check that the teacher's weights fit its architecture."
        )
    packed = packed[packed[:, _SCORE] >= spec.min_score]
    if len(packed) > spec.capacity:
        best = np.argsort(-packed[:, _SCORE], kind="stable")[: spec.capacity]
        packed = packed[np.sort(best)]
    stored = np.zeros((spec.capacity, _FIELDS), np.float32)
    stored[: len(packed)] = packed
    return Encoded({signal: stored, f"{signal}_count": np.array(len(packed), np.int32)}, 0.0, 1.0)
