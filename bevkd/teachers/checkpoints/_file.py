"""A public checkpoint as it lies on disk."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bevkd.errors import CheckpointError

_STATES = ("model_state", "state_dict")
"""Where OpenPCDet, and mmdetection3d and det3d, keep the weights."""


@dataclass(frozen=True)
class PublicFile:
    """Weights of another framework.

    Attributes:
        path: names the file in messages.
        tensors: by their public name, without the ``module.`` of parallel training.
        meta: what the framework wrote beside them, e.g. ``mmdet3d_version``.
    """

    path: Path
    tensors: Mapping[str, Tensor]
    meta: Mapping[str, Any] = field(default_factory=dict)


def read_public(path: Path) -> PublicFile:
    """Return the weights in a file of ``torch.save``; no code in it is run.

    Raises:
        CheckpointError: the file is missing, damaged, would have to run code, or holds no weights.
    """
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}. Correct teacher.checkpoint.")
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds more than tensors, and loading it would run code that it brings along (torch: "
            f"{_reason(error)}), so it is refused. If you trust it, open it where its framework is installed and save "
            "the tensors alone: torch.save({'state_dict': torch.load(FILE, weights_only=False)['state_dict']}, NEW). "
            "OpenPCDet calls them 'model_state'."
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{path} is damaged or no file of torch.save: {_reason(error)}. Fetch it again."
        ) from error
    state = loaded
    for name in _STATES:
        if isinstance(loaded, dict) and isinstance(loaded.get(name), dict):
            state = loaded[name]
    tensors = (
        {name: value for name, value in state.items() if isinstance(value, Tensor)} if isinstance(state, dict) else {}
    )
    if not tensors:
        raise CheckpointError(
            f"{path} holds no weights: neither 'model_state' nor 'state_dict', and no tensors by name. "
            "Give the checkpoint of a detector."
        )
    meta = loaded.get("meta")
    plain = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    return PublicFile(path, plain, meta if isinstance(meta, dict) else {})


def _reason(error: BaseException) -> str:
    """Return the first line of torch's message that says what it stumbled over."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first = next((line for line in lines if "unsupported" in line.lower()), lines[0] if lines else "empty")
    return first.removeprefix("WeightsUnpickler error: ").split(" was not ")[0]
