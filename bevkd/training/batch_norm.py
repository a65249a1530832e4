"""Batch norm over the frames of all processes."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm


class SyncedBatchNorm(_BatchNorm):
    """Batch norm whose statistics in training are those of all processes together, on CPUs as on GPUs.

    Frames may be spread unevenly, e.g. voxels. Weights have the names and shapes of torch's batch norms.
    """

    def forward(self, input: Float[Tensor, "B C *sizes"]) -> Float[Tensor, "B C *sizes"]:
        """Return ``input`` normalised."""
        if not self.training or not distributed.is_initialized():
            return super().forward(input)
        values = input.float()
        along = [axis for axis in range(input.dim()) if axis != 1]
        shape = [-1 if axis == 1 else 1 for axis in range(input.dim())]
        count = values.new_tensor([values.numel() / values.shape[1]])
        sums = _sum_over_processes(torch.cat([values.sum(along), count]))
        total = sums[-1].detach()
        mean = sums[:-1] / total
        centred = values - mean.view(shape)
        # In two rounds, because the difference of two large sums would lose digits.
        variance = _sum_over_processes(centred.square().sum(along)) / total
        if self.track_running_stats:
            self._track(mean.detach(), variance.detach() * total / (total - 1).clamp(min=1))
        result = centred * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            result = result * self.weight.view(shape) + self.bias.view(shape)
        normalised: Tensor = result.to(input.dtype)
        return normalised

    def _track(self, mean: Float[Tensor, "C"], variance: Float[Tensor, "C"]) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_(variance.to(self.running_var.dtype), share)

    def _check_input_dim(self, input: Tensor) -> None:
        """Take any number of dimensions."""


def _sum_over_processes(value: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
    total: Tensor = _SumOverProcesses.apply(value)  # type: ignore[no-untyped-call]
    return total


class _SumOverProcesses(torch.autograd.Function):
    """The sum over all processes; each of their losses depends on it, so its gradient is a sum too."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        del ctx
        total = value.contiguous().clone()
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        del ctx
        total = gradients[0].contiguous().clone()
        distributed.all_reduce(total)
        return total


def synchronise(module: nn.Module) -> None:
    """Replace every batch norm within ``module`` by one with the same weights that looks at all processes."""
    for name, child in module.named_children():
        if isinstance(child, _BatchNorm) and not isinstance(child, SyncedBatchNorm):
            replaced = SyncedBatchNorm(
                child.num_features, child.eps, child.momentum, child.affine, child.track_running_stats
            )
            for kind in ("_parameters", "_buffers"):
                setattr(replaced, kind, getattr(child, kind))
            setattr(module, name, replaced.train(child.training))
        else:
            synchronise(child)
