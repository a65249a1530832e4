"""What teachers from runs of ``train-teacher`` share."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from torch import nn

from bevkd.config import read_yaml
from bevkd.errors import CheckpointError, ContractError


def trained_part(run: Path, part: Literal["detector", "segmenter"], classes: Sequence[str]) -> dict[str, Any]:
    """Return what the recipe of a run says of the model that it trained.

    Raises:
        CheckpointError: there is no run.
        ContractError: it trained something else, or on other classes.
    """
    if not (run / "recipe.yaml").is_file():
        raise CheckpointError(
            f"teacher.run: there is no run in {run} (no recipe.yaml). Give the --out folder of a train-teacher run."
        )
    recipe = read_yaml(run / "recipe.yaml")
    if part not in recipe:
        other = "segmenter" if part == "detector" else "detector"
        raise ContractError(f"the run in {run} trained no {part}. Set teacher.name: {other}, or give another run.")
    trained_on = recipe.get("data", {}).get("classes", [])
    if list(trained_on) != list(classes):
        raise ContractError(
            f"the teacher in {run} was trained on the classes {', '.join(trained_on)}, this recipe has "
            f"{', '.join(classes)}. Set data.classes to the teacher's list, in its order."
        )
    model: dict[str, Any] = recipe[part]
    return model


def weights_digest(model: nn.Module) -> str:
    """Return the SHA-256 over names, shapes and bytes of all weights, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
