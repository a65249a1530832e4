"""Where the weights of a detector come from before its first step."""

from __future__ import annotations

from typing import Any

from safetensors.torch import load_file

from bevkd.config import read_yaml
from bevkd.errors import CheckpointError, ContractError
from bevkd.models.detector import Detector
from bevkd.models.inherit import inherit
from bevkd.progress import Progress
from pipeline.recipe import InitialConfig


def initialise(detector: Detector, initial: InitialConfig, progress: Progress) -> None:
    """Start the parts of ``detector`` that ``initial`` names from the weights of an earlier run.

    Raises:
        CheckpointError: there is no finished run, or nothing of a part fits.
        ContractError: the head would mean other classes.
    """
    run = initial.run
    weights = run / "model.safetensors"
    if not (run / "recipe.yaml").is_file() or not weights.is_file():
        raise CheckpointError(
            f"initial.run: there is no finished run in {run}. Give the --out folder of train-teacher or train-student."
        )
    recipe = read_yaml(run / "recipe.yaml")
    if "head" in initial.parts and (fault := _other_head(recipe, detector)):
        raise ContractError(f"initial.run: {run} has {fault}. Leave 'head' out of initial.parts, or make them equal.")
    taken = inherit(load_file(weights), detector, initial.parts, str(run))
    progress.note(f"from {run}: {taken}")


def _other_head(recipe: Any, detector: Detector) -> str | None:
    """Return what makes the channels of a run's head mean something else, None if nothing does."""
    trained = recipe.get("data", {}).get("classes", [])
    if list(trained) != list(detector.classes):
        return f"the classes {', '.join(trained)}, this recipe {', '.join(detector.classes)}"
    theirs = recipe.get("detector", {}).get("head", {})
    ours = detector.config.head.model_dump(mode="json")
    different = [key for key in ("name", "tasks", "anchors") if theirs.get(key) != ours.get(key)]
    return f"a head with another {' and '.join(different)}" if different else None
