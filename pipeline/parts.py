"""Building the parts of a run from its recipe, and checking that they fit, before any work starts."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import ValidationError

from bevkd import registry
from bevkd.cache.reader import CacheReader
from bevkd.cache.store import open_store
from bevkd.config import PluginConfig, StrictModel, read_yaml
from bevkd.data.sampler import BlockShuffle
from bevkd.data.source import FrameSource, Sensor
from bevkd.errors import ConfigError, ContractError, DataError, TrainingError, report
from bevkd.progress import Progress
from bevkd.training.checkpoint import write_atomic
from pipeline.recipe import LocalCopyConfig


def choose_device(name: str | None) -> torch.device:
    """Return the device of a recipe; None takes a GPU if there is one.

    Raises:
        ConfigError: the device does not exist on this machine.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device '{name}' is not usable on this machine: {error}. Set device: cpu.") from error
    return device


def open_source(config: PluginConfig, sensors: frozenset[Sensor], progress: Progress | None = None) -> FrameSource:
    """Return the data set of a recipe; tells ``progress`` what it has to say about its frames, e.g. those left out."""
    source: FrameSource = registry.load("bevkd.data.sources", config.name).build(config, sensors)
    for note in getattr(source, "notes", ()) if progress else ():
        progress.note(note)
    return source


def check_files(source: FrameSource, tokens: Sequence[str], sensors: frozenset[Sensor]) -> None:
    """Refuse missing and damaged sensor files, all of them at once.

    Raises:
        DataError: names every file.
    """
    faults = source.check(tokens, sensors)
    if faults:
        shown = [*faults[:20], *([f"and {len(faults) - 20} more"] if len(faults) > 20 else [])]
        advice = "Restore the files, or set data.skip_missing: true to leave their frames out."
        raise report(DataError, f"{len(faults)} sensor file(s) cannot be used. {advice}", shown)


def open_caches(uris: Mapping[str, str], local_copy: LocalCopyConfig) -> dict[str, CacheReader]:
    """Return a reader for each cache, by name; blocks of remote ones are copied to this machine as they are read."""
    copies = None
    if any(open_store(uri).remote for uri in uris.values()):
        from bevkd.cache.local_copy import LocalCopies, default_folder

        copies = LocalCopies(local_copy.folder or default_folder(), int(local_copy.max_gb * 1e9))
    return {name: CacheReader.open(uri, copies) for name, uri in uris.items()}


def block_shuffle(caches: Mapping[str, tuple[CacheReader, tuple[str, ...]]], max_gb: float) -> BlockShuffle | None:
    """Return how to shuffle frames, None if everything that a run reads of remote caches fits into its local copy.

    Args:
        caches: reader and the signals to read, by cache name.

    Raises:
        ContractError: the local copy is too small to shuffle at all.
    """
    remote = [(reader, reader.read_bytes(signals)) for reader, signals in caches.values() if reader.store.remote]
    total = sum(size for _, size in remote)
    if total <= max_gb * 1e9:
        return None
    largest = max(remote, key=lambda pair: pair[1])[0]
    per_block = total / largest.manifest.blocks
    window = int(max_gb * 1e9 / 2 / per_block)  # half of it is for the window that comes next
    if window < 2:
        raise ContractError(
            f"distill.local_copy.max_gb is {max_gb:g}, but four blocks take {4 * per_block / 1e9:.2g} GB: "
            "frames could not be shuffled. Raise it, or copy the caches to a disk with 'bevkd cache copy'."
        )
    size = largest.manifest.spec.block
    return BlockShuffle({token: index // size for index, token in enumerate(largest.tokens)}, window)


def is_main_process() -> bool:
    """Return whether this process writes: the only one, or the first of those that torchrun started."""
    return int(os.environ.get("RANK", "0")) == 0


MAY_DIFFER = frozenset(
    {
        "device",
        "data.root",
        "data.index_dir",
        "evaluation.data.root",
        "evaluation.data.index_dir",
        "evaluation.workers",
        "initial.run",
        "training.workers",
        "training.checkpoint_every",
        "training.keep",
        "distill.local_copy.folder",
    }
)
"""What a resumed run may change: where things are, and how they are loaded and kept."""

_SOURCE = re.compile(r"\bdata\.sources\.\d+\.")
"""Before the keys of one of several data sets that are put together."""


def other_recipe(run: Path, recipe: StrictModel) -> list[str]:
    """Return in what the recipe of a run folder differs from ``recipe``, beyond ``MAY_DIFFER``."""
    earlier = _completed(read_yaml(run / "recipe.yaml"), type(recipe))
    return [
        f"{key}: {old!r} there, {new!r} here"
        for key, old, new in _differences(earlier, recipe.model_dump(mode="json"))
        if _SOURCE.sub("data.", key) not in MAY_DIFFER
    ]


def prepare_run(run: Path, recipe: StrictModel, resume: bool) -> None:
    """Create a run folder with the resolved recipe, or check that it belongs to this recipe.

    Raises:
        TrainingError: the folder holds another run, or one that was not asked to go on, or cannot be written.
    """
    if not is_main_process():
        return
    resolved = recipe.model_dump(mode="json")
    path = run / "recipe.yaml"
    if path.exists():
        if different := other_recipe(run, recipe):
            raise report(TrainingError, f"{run} holds a run of another recipe; choose another --out:", different[:12])
        if not resume:
            raise TrainingError(f"{run} holds a run of this recipe. Add --resume to go on, or choose another --out.")
    try:
        run.mkdir(parents=True, exist_ok=True)
        # A run that was killed at once leaves a hidden temporary file, which does no harm.
        if not path.exists() and any(not entry.name.startswith(".") for entry in run.iterdir()):
            raise TrainingError(f"{run} is not empty and holds no run. Choose another --out.")
        write_atomic(path, yaml.safe_dump(resolved, sort_keys=False).encode())
    except OSError as error:
        raise TrainingError(
            f"{run} cannot be used as run folder: {error.strerror}. Choose another --out, a folder that can be written."
        ) from error


def _completed(earlier: dict[str, Any], kind: type[StrictModel]) -> dict[str, Any]:
    """Return a recipe with the keys that bevkd did not have when it was written, at their defaults."""
    try:
        return kind.model_validate(earlier).model_dump(mode="json")
    except ValidationError:
        return earlier


def _differences(old: Any, new: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        old, new = dict(enumerate(old)), dict(enumerate(new))
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted({*old, *new})
        return [
            found
            for key in keys
            for found in _differences(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
        ]
    return [] if old == new else [(path, old, new)]


def contract(headline: str, faults: Sequence[str]) -> None:
    """Raise all faults of a contract at once, if there are any.

    Raises:
        ContractError: lists ``faults``.
    """
    if faults:
        raise report(ContractError, headline, faults)
