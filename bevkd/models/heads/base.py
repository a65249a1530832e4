"""What every head's output offers, whatever it predicts: the maps that are cached and distilled."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor


@runtime_checkable
class HeadMaps(Protocol):
    """The signals of a head."""

    @property
    def heatmap(self) -> Float[Tensor, "B K Y X"]:
        """Class logits in the class order of the data set."""
        ...

    @property
    def box_code(self) -> Float[Tensor, "B T 10 Y X"]:
        """One box per cell and task, see ``bevkd.models.heads.center``."""
        ...
