"""A model's weights on disk: safetensors, written atomically and loaded strictly."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bevkd.errors import BevkdError, CheckpointError, report


def save_weights(path: Path, weights: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write weights as safetensors, atomically; ``metadata`` travels in the file's header."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    save_file(tensors, temporary, metadata=dict(metadata))
    temporary.replace(path)


def load_weights(path: Path, model: nn.Module) -> None:
    """Load safetensors into ``model``; every tensor must be used and every parameter found.

    Raises:
        CheckpointError: the file is missing or damaged, or names every tensor that is missing, extra or misshapen.
    """
    if not path.is_file():
        raise CheckpointError(f"no weights at {path}. Give the folder of a finished run (it holds model.safetensors).")
    try:
        found = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is damaged or no safetensors file: {error}. Restore it or train again."
        ) from error
    wanted = model.state_dict()
    faults = [f"missing: {name} {list(wanted[name].shape)}" for name in wanted if name not in found]
    faults += [f"not in the model: {name} {list(found[name].shape)}" for name in found if name not in wanted]
    faults += [
        f"shape of {name}: file {list(found[name].shape)}, model {list(wanted[name].shape)}"
        for name in wanted
        if name in found and wanted[name].shape != found[name].shape
    ]
    if faults:
        raise misfit(path, faults)
    model.load_state_dict(found)


def misfit(path: Path, faults: Sequence[str]) -> BevkdError:
    """Return the error that a file does not fit the model; it lists the first dozen of ``faults``."""
    shown = [*faults[:12], *([f"and {len(faults) - 12} more"] if len(faults) > 12 else [])]
    return report(CheckpointError, f"{path} does not fit the model of this recipe:", shown)
