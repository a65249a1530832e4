"""The detector of a finished run, or of a recipe with weights: what evaluation, prediction and export begin with."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from bevkd.config import apply_overrides, parse, read_yaml
from bevkd.errors import ConfigError
from bevkd.models.detector import Detector
from bevkd.models.weights import load_weights
from pipeline.parts import choose_device
from pipeline.recipe import StudentRecipe, find

WEIGHTS = "model"
"""Name of the weights that a run leaves: ``model.safetensors``."""


def recipe_values(run: str, overrides: Sequence[str]) -> tuple[dict[str, Any], str]:
    """Return the recipe of a run folder, or a recipe by path or name, with ``overrides``, and where it stands."""
    path = Path(run) / "recipe.yaml" if Path(run).is_dir() else find(run)
    return apply_overrides(read_yaml(path), overrides), str(path)


def detector_recipe(values: Mapping[str, Any], where: str) -> StudentRecipe:
    """Return the recipe of a detector.

    Raises:
        ConfigError: it is that of a segmenter.
    """
    if "segmenter" in values:
        raise ConfigError(f"{where} is the recipe of a segmenter. Give the run of a detector.")
    return parse(StudentRecipe, dict(values), where)


def weight_file(run: str, weights: str) -> Path:
    """Return the file of ``weights``: a name within the run folder without its suffix, or the path of a file.

    Raises:
        ConfigError: ``run`` is no folder, so that it has no weights of its own.
    """
    if weights.endswith(".safetensors"):
        return Path(weights)
    if not Path(run).is_dir():
        raise ConfigError(f"{run} is no run folder. Give one, or add --weights FILE.safetensors for this recipe.")
    return Path(run) / f"{weights}.safetensors"


def trained_detector(recipe: StudentRecipe, run: str, device: torch.device, weights: str = WEIGHTS) -> Detector:
    """Return the detector of ``recipe`` with the weights of ``run`` on ``device``; see :func:`weight_file`.

    Raises:
        CheckpointError: the weights are missing or those of another model.
    """
    path = weight_file(run, weights)
    detector = Detector(recipe.detector, tuple(recipe.data.classes))
    load_weights(path, detector)
    return detector.to(device)


@contextmanager
def joined_processes(device: str | None) -> Iterator[torch.device]:
    """Join the processes that torchrun started, if it did, and give each the device that it works on.

    Args:
        device: of the recipe, see ``choose_device``.
    """
    chosen = choose_device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or distributed.is_initialized():
        yield chosen
        return
    if chosen.type == "cuda":
        chosen = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(chosen)
    distributed.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield chosen
    finally:
        distributed.destroy_process_group()
