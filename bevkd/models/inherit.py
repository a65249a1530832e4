"""Start a narrow detector from the weights of a wide one.

Students of RDD (arXiv 2308.10308) and SparseKD (arXiv 2205.15156) are narrow copies of their teacher and start from its
weights. Channel ``i`` of ``n`` takes over channel ``floor(i m / n)`` of the teacher's ``m``: spread evenly, so that
what a layer reads is what the layer before writes, behind concatenations too if all of their parts shrink alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bevkd.errors import CheckpointError

_LEAST_CHANNELS = 8
"""Narrower dimensions hold no channels but classes, box values, point features or the sides of a kernel."""


@dataclass(frozen=True)
class Inheritance:
    """What became of the tensors of a model's parts.

    Attributes:
        same: taken over as they are.
        narrowed: taken over in part.
        fresh: left as they were: the source lacks them, or has them in another form.
    """

    same: tuple[str, ...]
    narrowed: tuple[str, ...]
    fresh: tuple[str, ...]

    def __str__(self) -> str:
        taken = f"{len(self.same)} tensors inherited as they are, {len(self.narrowed)} in part"
        if not self.fresh:
            return taken
        shown = ", ".join(self.fresh[:5]) + (", ..." if len(self.fresh) > 5 else "")
        return f"{taken}; {len(self.fresh)} start anew: {shown}"


def inherit(source: Mapping[str, Tensor], model: nn.Module, parts: Sequence[str], origin: str) -> Inheritance:
    """Give the tensors of ``model`` in ``parts`` the values of those of the same name, narrowed where it is narrower.

    Args:
        source: weights by name, e.g. of a teacher.
        parts: names of submodules.
        origin: where ``source`` is from, for the error.

    Raises:
        CheckpointError: nothing of a part fits.
    """
    wanted = model.state_dict()
    found: dict[str, Tensor] = {}
    for part in parts:
        names = [name for name in wanted if name.startswith(f"{part}.")]
        fitting = {name: narrowed(source[name], wanted[name].shape) for name in names if name in source}
        taken = {name: value for name, value in fitting.items() if value is not None}
        if not any(wanted[name].dim() > 0 for name in taken):
            raise CheckpointError(
                f"{origin} has nothing that fits the part '{part}' of this model. Leave it out of initial.parts, or "
                "give a run whose detector has the same kind of it and is at least as wide."
            )
        found |= taken
    same = tuple(name for name in found if found[name].shape == source[name].shape)
    narrow = tuple(name for name in found if name not in same)
    fresh = tuple(name for name in wanted if name not in found and name.partition(".")[0] in parts)
    model.load_state_dict({**wanted, **found})
    return Inheritance(same, narrow, fresh)


def narrowed(value: Tensor, shape: Sequence[int]) -> Tensor | None:
    """Return ``value`` with evenly spread channels kept in every dimension, None if that does not give ``shape``."""
    if value.dim() != len(shape):
        return None
    for dim, (have, want) in enumerate(zip(value.shape, shape, strict=True)):
        if want == have:
            continue
        if want > have or want < _LEAST_CHANNELS:
            return None
        kept = torch.arange(want, device=value.device) * have // want
        value = value.index_select(dim, kept)
    return value
