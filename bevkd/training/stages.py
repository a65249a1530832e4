"""Parts of a model by the prefix of their parameters' names: frozen ones, and those with their own learning rate."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bevkd.errors import ConfigError, report
from bevkd.training.config import TrainingConfig
from bevkd.training.objective import Objective, SegmenterObjective


def under(name: str, prefix: str) -> bool:
    """Return whether ``name`` is ``prefix`` or lies within it: ``encoder`` holds ``encoder.neck``, not ``encoder2``."""
    return name == prefix or name.startswith(f"{prefix}.")


def named_weights(objective: Objective | SegmenterObjective) -> dict[str, nn.Parameter]:
    """Return every parameter by the name that recipes call it: its own in the model, ``adapters...`` of losses."""
    own = {id(weight): name for name, weight in objective.model.named_parameters()}
    return {own.get(id(weight), name): weight for name, weight in objective.named_parameters()}


def freeze(objective: Objective | SegmenterObjective, prefixes: Sequence[str]) -> list[nn.Module]:
    """Stop the gradients of the parts with these prefixes, and return their batch norms, which stay in eval mode.

    Raises:
        ConfigError: a prefix names no part, or nothing is left to train.
    """
    weights = named_weights(objective)
    _check(prefixes, list(weights), "training.frozen")
    for name, weight in weights.items():
        if any(under(name, prefix) for prefix in prefixes):
            weight.requires_grad_(False)
    if not any(weight.requires_grad for weight in weights.values()):
        raise ConfigError(f"training.frozen: {', '.join(prefixes)} is all there is; nothing is left to train.")
    return [
        module
        for name, module in objective.model.named_modules()
        if isinstance(module, _BatchNorm) and any(under(name, prefix) for prefix in prefixes)
    ]


def optimizer_of(
    objective: Objective | SegmenterObjective, config: TrainingConfig
) -> tuple[torch.optim.Optimizer, list[float]]:
    """Return AdamW over all that is trained, and the learning rate of each of its groups relative to the run's.

    Raises:
        ConfigError: a prefix of ``learning_rates`` names no part.
    """
    rates, weights = config.learning_rates, named_weights(objective)
    _check(list(rates), list(weights), "training.learning_rates")
    groups: dict[float, list[nn.Parameter]] = {}
    for name, weight in weights.items():
        if weight.requires_grad:
            groups.setdefault(_factor(name, rates), []).append(weight)
    return (
        torch.optim.AdamW(
            [{"params": group} for group in groups.values()], lr=config.learning_rate, weight_decay=config.weight_decay
        ),
        list(groups),
    )


def _factor(name: str, rates: Mapping[str, float]) -> float:
    """Return the rate of the longest prefix that ``name`` lies within."""
    fitting = [prefix for prefix in rates if under(name, prefix)]
    return rates[max(fitting, key=len)] if fitting else 1.0


def _check(prefixes: Sequence[str], names: Sequence[str], where: str) -> None:
    parts = {".".join(name.split(".")[:depth]): None for name in names for depth in range(1, name.count(".") + 2)}
    faults = []
    for prefix in prefixes:
        if prefix not in parts:
            near = difflib.get_close_matches(prefix, parts, n=3, cutoff=0.5)
            shown = near or [part for part in parts if "." not in part]
            faults.append(f"'{prefix}' is no part of this model; near are: {', '.join(shown)}")
    if faults:
        raise report(ConfigError, f"{where} does not fit the model:", faults)
