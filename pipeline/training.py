"""The story that teachers and students share: data, model, training, evaluation."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bevkd.cache.reader import CacheReader
from bevkd.config import digest
from bevkd.data.join import TrainingDataset
from bevkd.data.sampler import BlockShuffle, FrameOrder
from bevkd.data.source import FrameSource, Sensor
from bevkd.distill.base import DistillLoss
from bevkd.errors import ContractError
from bevkd.evaluation.score import Report
from bevkd.models.detector import Detector, DetectorConfig, view_of
from bevkd.progress import Progress, Silent
from bevkd.training.checkpoint import write_atomic
from bevkd.training.config import TrainingConfig
from bevkd.training.loop import Trainer, TrainingResult
from bevkd.training.objective import Objective, SegmenterObjective
from pipeline.evaluate import evaluate_detector, open_evaluation
from pipeline.initial import initialise
from pipeline.parts import check_files, choose_device, is_main_process, prepare_run
from pipeline.recipe import SegmenterRecipe, TrainRecipe


@dataclass(frozen=True)
class RunSummary:
    """What a training run cost and gave.

    Attributes:
        report: metrics of the final weights, if the recipe evaluates.
    """

    run: Path
    cost: TrainingResult
    report: Report | None

    def to_json(self) -> dict[str, Any]:
        """Return the summary as plain values."""
        return {
            "run": str(self.run),
            **asdict(self.cost),
            "metrics": self.report.to_json() if self.report else None,
        }


@dataclass(frozen=True)
class Distillation:
    """What a distilled run adds.

    Attributes:
        caches: reader and the signals that are read, by cache name.
        losses: label, cache and loss.
        unlabelled: train on frames without labels too.
        shuffle: None shuffles all frames alike.
        depth: the cache that depth supervision reads; None loads point clouds for it.
    """

    caches: Mapping[str, tuple[CacheReader, tuple[str, ...]]]
    losses: list[tuple[str, str, DistillLoss]]
    unlabelled: bool
    shuffle: BlockShuffle | None = None
    depth: CacheReader | None = None


PLAIN = Distillation({}, [], unlabelled=False)


def train(
    recipe: TrainRecipe,
    source: FrameSource,
    detector: Detector,
    distillation: Distillation,
    run: Path,
    resume: bool,
    progress: Progress,
) -> RunSummary:
    """Train ``detector`` in ``run``, going on from its newest checkpoint if there is one, and evaluate it.

    Everything that may be wrong is found before the run folder is made, the evaluation's frames included.
    """
    labelled = [token for token in source.tokens if token in source.labelled]
    unlabelled = [token for token in source.tokens if token not in source.labelled] if distillation.unlabelled else []
    if not labelled and not unlabelled:
        raise ContractError("no frame to train on: none has labels. Raise data.labels, or distil on all frames.")
    view = replace(view_of(detector.config), sensors=loaded_sensors(detector.config, distillation.depth is not None))
    check_files(source, [*labelled, *unlabelled], view.sensors)
    dataset = TrainingDataset(
        source,
        view,
        FrameOrder(labelled, unlabelled, recipe.training.labelled_share, recipe.training.seed, distillation.shuffle),
        recipe.augment,
        distillation.caches,
        recipe.training.seed,
        distillation.depth,
    )
    device = choose_device(recipe.device)
    evaluation = recipe.evaluation
    held_out = open_evaluation(evaluation, detector, progress) if evaluation else None
    readers = {name: reader for name, (reader, _) in distillation.caches.items()}
    objective = Objective(detector, distillation.losses, readers)
    facts: dict[str, object] = {
        "classes": detector.classes,
        "caches": {name: reader.manifest.name for name, reader in readers.items()},
    }
    if distillation.depth:
        facts["lidar_depth"] = distillation.depth.manifest.name
    trainer, step = open_run(objective, recipe, facts, run, resume, device)
    known = f"{len(labelled)} labelled" + (f" and {len(unlabelled)} unlabelled" if unlabelled else "")
    progress.note(f"{known} frames" + (f", resuming at step {step}" if step else ""))
    if distillation.shuffle:
        window = distillation.shuffle.window
        progress.note(f"the caches exceed the local copy: frames are shuffled {window} blocks at a time")
    cost = trainer.train(dataset, progress)

    report = None
    if evaluation and held_out and is_main_process():
        detector.load_state_dict(trainer.final_weights())
        report = evaluate_detector(detector, held_out, evaluation, run, progress)
    return close_run(RunSummary(run, cost, report))


def open_run(
    objective: Objective | SegmenterObjective,
    recipe: TrainRecipe | SegmenterRecipe,
    facts: Mapping[str, object],
    run: Path,
    resume: bool,
    device: torch.device,
) -> tuple[Trainer, int]:
    """Return the trainer of a run folder, which is made if it is not there, and the step that it goes on from.

    Args:
        facts: what the weight file says about itself, beside the recipe.
    """
    prepare_run(run, recipe, resume)
    # One key only: safetensors writes several in an order of chance, and equal runs would have unequal files.
    metadata = {"bevkd": json.dumps({"recipe": digest(recipe), **facts}, sort_keys=True)}
    trainer = Trainer(objective, recipe.training, run, device.type, metadata)
    return trainer, trainer.resume()


def close_run(summary: RunSummary) -> RunSummary:
    """Keep the summary of a run in its folder, and return it."""
    if is_main_process():
        write_atomic(summary.run / "result.json", json.dumps(summary.to_json(), indent=1).encode())
    return summary


def loaded_sensors(config: DetectorConfig, cached_depth: bool) -> frozenset[Sensor]:
    """Return what training loads from sensor files."""
    return config.training_sensors - (frozenset({"lidar_depth"}) if cached_depth else frozenset())


def seed(config: TrainingConfig) -> None:
    """Set the process's random state and threads, so that weights are drawn from the recipe's seed alone."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)


def seeded_detector(recipe: TrainRecipe, progress: Progress | None = None) -> Detector:
    """Return the recipe's detector: weights drawn from its seed alone, or from ``initial``; sets threads, too."""
    seed(recipe.training)
    detector = Detector(recipe.detector, tuple(recipe.data.classes))
    if recipe.initial:
        initialise(detector, recipe.initial, progress or Silent())
    return detector
