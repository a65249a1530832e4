"""Public tensors into ours, each of them used or named."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from bevkd.errors import CheckpointError
from bevkd.models.detector import Detector
from bevkd.models.weights import misfit
from bevkd.teachers.checkpoints._file import PublicFile
from bevkd.teachers.checkpoints._layers import Layer, Layout

Kernels = Literal["spconv1", "spconv2", "native"]

_ORDERS: dict[Kernels, tuple[int, ...]] = {
    "spconv1": (4, 0, 1, 2, 3),  # (z, y, x, in, out), of mmcv's own operators too
    "spconv2": (0, 1, 2, 3, 4),  # (out, z, y, x, in), which is ours
    "native": (3, 0, 1, 2, 4),  # (z, y, x, out, in)
}
_NORM = ("weight", "bias", "running_mean", "running_var")


def convert(file: PublicFile, detector: Detector, layout: Layout, kernels: Kernels | None = None) -> dict[str, Tensor]:
    """Return the state of ``detector`` from a file.

    A bias before a batch norm is subtracted from its running mean: exact, as a cache is an eval-mode teacher.

    Args:
        layout: of the file.
        kernels: order of sparse kernels; None finds out.

    Raises:
        CheckpointError: names every tensor that is missing, left over or misshapen, or asks for ``kernels``.
    """
    kernels = kernels or _find_kernels(file, detector, layout)
    wanted = detector.state_dict()
    state: dict[str, Tensor] = {}
    faults: list[str] = []
    used = set(layout.bookkeeping)

    def take(name: str) -> Tensor | None:
        used.add(name)
        if name not in file.tensors:
            faults.append(f"missing: {name}")
        return file.tensors.get(name)

    def put(ours: str, theirs: str, value: Tensor | None) -> None:
        if value is not None and value.shape != wanted[ours].shape:
            found = list(file.tensors[theirs].shape)
            faults.append(f"shape of {theirs}: {found} in the file gives {list(value.shape)}, {_wants(ours, wanted)}")
        elif value is not None:
            state[ours] = value.to(wanted[ours].dtype, copy=True)

    for layer in layout.layers:
        weight = take(f"{layer.theirs}.weight")
        target = wanted[f"{layer.ours}.weight"]
        put(f"{layer.ours}.weight", f"{layer.theirs}.weight", _weight(weight, target, layer, layout.x_major, kernels))
        if layer.norm is None:
            bias = take(f"{layer.theirs}.bias")
            put(f"{layer.ours}.bias", f"{layer.theirs}.bias", _mapped(bias, layer.outputs))
            continue
        ours, theirs = layer.norm
        for name in _NORM:
            put(f"{ours}.{name}", f"{theirs}.{name}", take(f"{theirs}.{name}"))
        counted = f"{theirs}.num_batches_tracked"
        used.add(counted)
        state[f"{ours}.num_batches_tracked"] = file.tensors.get(counted, torch.zeros((), dtype=torch.int64))
        if f"{layer.theirs}.bias" in file.tensors:
            bias = take(f"{layer.theirs}.bias")
            mean = state.get(f"{ours}.running_mean")
            if bias is not None and mean is not None and bias.shape == mean.shape:
                state[f"{ours}.running_mean"] = mean - bias
            elif mean is not None:
                faults.append(f"shape of {layer.theirs}.bias: its batch norm has {len(mean)} channels")
    faults += [
        f"not in the model: {name} {list(file.tensors[name].shape)}" for name in file.tensors if name not in used
    ]
    if faults:
        raise misfit(file.path, faults)
    return state


def _wants(ours: str, wanted: dict[str, Tensor]) -> str:
    hint = ""
    if ours == "encoder.layers.0.linear.weight":
        hint = " (see point_features and center_offsets of the pillar encoder)"
    return f"the model wants {list(wanted[ours].shape)} for {ours}{hint}"


def _weight(
    weight: Tensor | None, target: Tensor, layer: Layer, x_major: bool, kernels: Kernels | None
) -> Tensor | None:
    """Return a weight in our order; one whose shape fits nothing is left for the caller to refuse."""
    if weight is None or weight.dim() != target.dim():
        return weight
    if target.dim() == 5:
        return weight if kernels is None else _reordered(weight, kernels, x_major)
    if layer.square and target.dim() == 4:
        ins, outs = target.shape[:2]
        if weight.shape[:2] == (outs, ins) and (ins != outs or layer.square == "conv"):
            weight = weight.transpose(0, 1)
    if x_major and target.dim() == 4:
        weight = weight.transpose(2, 3)
    if layer.inputs is not None and len(layer.inputs) == weight.shape[1]:
        weight = torch.matmul(weight, layer.inputs.to(weight))
    return _mapped(weight, layer.outputs)


def _mapped(value: Tensor | None, outputs: Tensor | None) -> Tensor | None:
    if value is None or outputs is None or outputs.shape[1] != value.shape[0]:
        return value
    mapped: Tensor = torch.tensordot(outputs.to(value), value, dims=1)
    return mapped


def _reordered(weight: Tensor, kernels: Kernels, x_major: bool) -> Tensor:
    ordered = weight.permute(_ORDERS[kernels])
    return ordered.permute(0, 3, 2, 1, 4) if x_major else ordered


def _find_kernels(file: PublicFile, detector: Detector, layout: Layout) -> Kernels | None:
    """Return the one order that fits the shapes of all sparse kernels; None if there is none, or no such kernel.

    A kernel with as many channels in as out fits two orders; others of the same file tell which.
    """
    wanted, found = detector.state_dict(), set(_ORDERS)
    seen = False
    for layer in layout.layers:
        weight, target = file.tensors.get(f"{layer.theirs}.weight"), wanted[f"{layer.ours}.weight"]
        if weight is None or target.dim() != 5 or weight.dim() != 5:
            continue
        fits = {order for order in _ORDERS if _reordered(weight, order, layout.x_major).shape == target.shape}
        # A misshapen kernel says nothing about the order; it is refused by name later.
        found, seen = (found & fits if fits else found), seen or bool(fits)
    if not seen:
        return None
    if len(found) != 1:
        raise CheckpointError(
            f"{file.path}: the shapes of its sparse kernels fit {' and '.join(sorted(found)) or 'no order together'}. "
            f"Say which it is: teacher.checkpoint_kernels, one of {', '.join(_ORDERS)}."
        )
    return found.pop()
