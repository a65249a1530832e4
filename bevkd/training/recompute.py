"""Gradient checkpointing (Chen et al., arXiv 1604.06174): memory for time, and nothing else."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from bevkd.errors import ConfigError


def recompute_backbone(model: nn.Module) -> None:
    """Let the stages of the model's image backbones forget their inner maps, and compute them again for gradients.

    Losses, gradients and the statistics of batch norms stay what they are.

    Raises:
        ConfigError: the model has no image backbone of several stages.
    """
    backbones = [module for name, module in model.named_modules() if name.rpartition(".")[2] == "backbone"]
    found = [stages for backbone in backbones if (stages := _stages(backbone)) is not None]
    if not found:
        raise ConfigError(
            "training.gradient_checkpointing recomputes the stages of an image backbone, and this model has none. "
            "Set it to false."
        )
    for stage in (stage for stages in found for stage in stages):
        stage.forward = _recomputed(stage)


def _stages(backbone: nn.Module) -> nn.ModuleList | None:
    """Return the outermost list of modules, which in the backbones of transformers holds the stages."""
    return next((module for module in backbone.modules() if isinstance(module, nn.ModuleList)), None)


def _recomputed(stage: nn.Module) -> Callable[..., Any]:
    forward = stage.forward
    norms = [module for module in stage.modules() if isinstance(module, _BatchNorm)]

    def contexts() -> tuple[contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]]:
        return contextlib.nullcontext(), _statistics_kept(norms)

    def run(*arguments: Any, **keywords: Any) -> Any:
        if not (stage.training and torch.is_grad_enabled()):
            return forward(*arguments, **keywords)
        return checkpoint(forward, *arguments, use_reentrant=False, context_fn=contexts, **keywords)

    return run


@contextlib.contextmanager
def _statistics_kept(norms: list[_BatchNorm]) -> Iterator[None]:
    """Let the second pass write to copies of the running statistics, which the first pass has brought up to date."""
    own = [dict(norm._buffers) for norm in norms]
    for norm in norms:
        norm._buffers.update({name: None if value is None else value.clone() for name, value in norm._buffers.items()})
    try:
        yield
    finally:
        for norm, buffers in zip(norms, own, strict=True):
            norm._buffers.update(buffers)
