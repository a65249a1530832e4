"""A trained student as an ONNX file, checked on real frames."""

from __future__ import annotations

import hashlib
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch

from bevkd import __version__
from bevkd.config import digest
from bevkd.console import size_text
from bevkd.data.collate import Batch, collate
from bevkd.data.join import FrameDataset
from bevkd.data.source import FrameSource
from bevkd.errors import ConfigError, ContractError
from bevkd.export import TOLERANCE, Agreement, Part, agreement, check_exportable, export, inputs_of, session
from bevkd.models.detector import Detector, view_of
from bevkd.progress import Progress
from pipeline.parts import check_files, open_source
from pipeline.trained import WEIGHTS, detector_recipe, recipe_values, trained_detector, weight_file


@dataclass(frozen=True)
class ExportSettings:
    """What is exported, and how it is checked.

    Attributes:
        weights: a name within the run folder, or the path of a file.
        part: ``all`` from images to the head's maps, ``dense`` from ``bev_low`` to the head's maps.
        opset: version of ONNX's operator set.
        batch: frames that the graph takes at once.
        checks: batches on which onnxruntime is compared with torch.
        threads: of both.
    """

    weights: str = WEIGHTS
    part: Part = "all"
    opset: int = 18
    batch: int = 1
    checks: int = 2
    threads: int = 1


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        inputs: shape of each, by name.
        parameters: numbers that the student was trained to.
        checked: tokens of the frames of the comparison.
        difference, scale: see ``bevkd.export.Agreement``.
        relative: the worst difference over the largest absolute value of its map.
        torch_ms, onnxruntime_ms: of one batch on the CPU, the median.
    """

    path: Path
    bytes: int
    opset: int
    inputs: dict[str, list[int]]
    parameters: int
    checked: tuple[str, ...]
    difference: dict[str, float]
    scale: dict[str, float]
    relative: float
    torch_ms: float
    onnxruntime_ms: float

    def to_json(self) -> dict[str, Any]:
        """Return the summary as plain values."""
        return {**asdict(self), "path": str(self.path), "checked": list(self.checked)}

    @property
    def text(self) -> str:
        """What a person reads."""
        inputs = ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in self.inputs.items())
        apart = ", ".join(f"{name} {value:.2g} of {self.scale[name]:.3g}" for name, value in self.difference.items())
        return (
            f"{self.path}: {size_text(self.bytes)}, opset {self.opset}, {self.parameters / 1e6:.2f} M parameters\n"
            f"inputs: {inputs}\n"
            f"largest difference from torch on {len(self.checked)} frames: {apart} (largest value)\n"
            f"on the CPU: onnxruntime {self.onnxruntime_ms:.0f} ms, torch {self.torch_ms:.0f} ms per batch"
        )


def export_run(run: str, out: Path, settings: ExportSettings, overrides: Sequence[str], progress: Progress) -> Exported:
    """Write the student of a run as ONNX, and return how it compares with torch on frames of its data set.

    Args:
        run: folder of a run, or a recipe by path or name.
        out: file to write; there must be nothing yet.
        overrides: change the recipe, e.g. where its data lies.

    Raises:
        ConfigError: ``out`` exists, or a package is missing.
        ContractError: the detector cannot be exported, or onnxruntime finds other maps than torch.
    """
    if out.exists():
        raise ConfigError(f"{out} exists. Remove it, or choose another --out.")
    values, where = recipe_values(run, overrides)
    recipe = detector_recipe(values, where)
    torch.set_num_threads(settings.threads)
    detector = trained_detector(recipe, run, torch.device("cpu"), settings.weights).eval()
    check_exportable(detector, settings.part, settings.opset)
    source = open_source(recipe.evaluation.data if recipe.evaluation else recipe.data, detector.config.sensors)
    batches = _batches(source, detector, settings)
    about = {
        "bevkd": __version__,
        "recipe": digest(recipe),
        "weights_sha256": hashlib.sha256(weight_file(run, settings.weights).read_bytes()).hexdigest(),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.tmp")
    progress.note("writing the graph, which takes a minute")
    try:
        export(detector, batches[0], temporary, settings.part, settings.opset, about)
        exported = _checked(detector, batches, temporary, settings)
        temporary.replace(out)
    finally:
        temporary.unlink(missing_ok=True)
    return Exported(path=out, **exported)


def _batches(source: FrameSource, detector: Detector, settings: ExportSettings) -> list[Batch]:
    """Return the first frames in batches; a data set of fewer frames repeats them."""
    tokens = [source.tokens[i % len(source.tokens)] for i in range(settings.batch * settings.checks)]
    check_files(source, list(dict.fromkeys(tokens)), detector.config.sensors)
    frames = FrameDataset(source, tokens, view_of(detector.config))
    samples = [frames[index] for index in range(len(frames))]
    return [collate(samples[first : first + settings.batch]) for first in range(0, len(samples), settings.batch)]


def _checked(detector: Detector, batches: Sequence[Batch], path: Path, settings: ExportSettings) -> dict[str, Any]:
    """Return the fields of :class:`Exported` but its path.

    Raises:
        ContractError: the maps differ.
    """
    part, running = settings.part, session(path, settings.threads)
    found = reduce(Agreement.joined, (agreement(detector, batch, running, part) for batch in batches))
    if found.relative > TOLERANCE:
        raise ContractError(
            f"onnxruntime's maps differ from torch's by {found.relative:.2g} of the largest value, more than "
            f"{TOLERANCE:g}: {dict(found.difference)}. Try another --opset, and report it."
        )
    inputs = inputs_of(detector, batches[0], part)
    arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
    with torch.inference_mode():
        torch_ms = _median_ms(lambda: detector(batches[0]))
    return {
        "bytes": path.stat().st_size,
        "opset": settings.opset,
        "inputs": {name: list(tensor.shape) for name, tensor in inputs.items()},
        "parameters": sum(parameter.numel() for parameter in detector.parameters()),
        "checked": tuple(dict.fromkeys(token for batch in batches for token in batch.tokens)),
        "difference": dict(found.difference),
        "scale": dict(found.scale),
        "relative": found.relative,
        "torch_ms": torch_ms,
        "onnxruntime_ms": _median_ms(lambda: running.run(None, arrays)),
    }


def _median_ms(work: Callable[[], object], rounds: int = 3) -> float:
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        work()
        times.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times)
