"""The story that teachers and students share: data, model, training, evaluation."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import distributed

from bevkd.cache.reader import CacheReader
from bevkd.config import digest
from bevkd.data.collate import Batch
from bevkd.data.identity import DatasetIdentity
from bevkd.data.join import TrainingDataset, View
from bevkd.data.sampler import BlockShuffle, FrameOrder, balance
from bevkd.data.source import FrameSource
from bevkd.distill.base import DistillLoss, DistillLossConfig, TeacherBatch
from bevkd.errors import ConfigError, ContractError
from bevkd.evaluation.score import Report, scored_frames
from bevkd.grid import BEVGrid
from bevkd.models.detector import Detector, DetectorConfig, view_of
from bevkd.progress import Progress, Silent
from bevkd.training.checkpoint import write_atomic
from bevkd.training.config import BalanceConfig, TrainingConfig
from bevkd.training.loop import Trainer
from bevkd.training.objective import Cached, Objective, SegmenterObjective
from bevkd.training.result import TrainingResult
from bevkd.training.terms import Terms
from pipeline.evaluate import evaluate_detector, open_evaluation
from pipeline.initial import initialise
from pipeline.parts import check_files, choose_device, is_main_process, prepare_run
from pipeline.recipe import SegmenterRecipe, TrainRecipe
from pipeline.validation import InLoop, spread


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


class LiveTeacher(Protocol):
    """A teacher that runs within the training step; what it must offer in place of a cache.

    Attributes:
        fingerprint: says which teacher it is.
        view: what it reads of a frame.
        sample_shapes: per-sample shape of each map, and [9,C] of points, as of a cache.
    """

    fingerprint: str
    view: View
    sample_shapes: Mapping[str, tuple[int, ...]]

    def require(
        self,
        signals: Sequence[str],
        grid: BEVGrid | None = None,
        tokens: Sequence[str] | None = None,
        classes: Sequence[str] | None = None,
        dataset: DatasetIdentity | None = None,
    ) -> list[str]:
        """Return everything in which the teacher does not fit its use, as ``CacheReader.require`` does."""
        ...

    def __call__(self, batch: Batch) -> TeacherBatch:
        """Return what the losses read of an augmented batch, in the student's frame."""
        ...


@dataclass(frozen=True)
class Distillation:
    """What a distilled run adds.

    Attributes:
        caches: reader and the signals that are read, by cache name.
        losses: label, name of the cache or teacher, and loss.
        unlabelled: train on frames without labels too.
        shuffle: None shuffles all frames alike.
        depth: the cache that depth supervision reads; None loads point clouds for it.
        teachers: those at work within the step, by name.
        configs: of the losses, by label.
        balance: None leaves their terms as they are weighted.
    """

    caches: Mapping[str, tuple[CacheReader, tuple[str, ...]]]
    losses: list[tuple[str, str, DistillLoss]]
    unlabelled: bool
    shuffle: BlockShuffle | None = None
    depth: CacheReader | None = None
    teachers: Mapping[str, LiveTeacher] = field(default_factory=dict)
    configs: Mapping[str, DistillLossConfig] = field(default_factory=dict)
    balance: BalanceConfig | None = None


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
    labelled, unlabelled = frames_to_train_on(source, distillation)
    dataset = training_dataset(recipe, source, detector, distillation)
    device = choose_device(recipe.device)
    evaluation = recipe.evaluation
    held_out = open_evaluation(evaluation, detector, progress) if evaluation else None
    readers = {name: reader for name, (reader, _) in distillation.caches.items()}
    cached = {name: Cached(name, reader.manifest.spec, detector.config.grid) for name, reader in readers.items()}
    objective = Objective(detector, distillation.losses, {**cached, **distillation.teachers})
    facts: dict[str, object] = {
        "classes": detector.classes,
        "caches": {name: reader.manifest.name for name, reader in readers.items()},
    }
    if distillation.teachers:
        facts["online"] = {name: teacher.fingerprint for name, teacher in distillation.teachers.items()}
    if distillation.depth:
        facts["lidar_depth"] = distillation.depth.manifest.name
    in_loop = None
    if evaluation and held_out:
        scored = scored_frames(held_out)
        frames = None if evaluation.frames is None else spread(scored, evaluation.frames)
        in_loop = InLoop(lambda: evaluate_detector(detector, held_out, evaluation, run, Silent(), frames))
    terms = Terms(distillation.configs, distillation.balance, recipe.training.steps)
    if unpunished := _invites_inventions(recipe.training, distillation, labelled, unlabelled):
        terms.warn("no negatives", unpunished)
    trainer, step = open_run(objective, recipe, facts, run, resume, device, in_loop, terms)
    progress.note(_counted(source, labelled, unlabelled) + (f", resuming at step {step}" if step else ""))
    if distillation.shuffle:
        window = distillation.shuffle.window
        progress.note(f"the caches exceed the local copy: frames are shuffled {window} blocks at a time")
    cost = trainer.train(dataset, progress)

    report = None
    if evaluation and held_out:
        detector.load_state_dict(trainer.final_weights())
        report = evaluate_detector(detector, held_out, evaluation, run, progress)
    return close_run(RunSummary(run, cost, report))


def frames_to_train_on(source: FrameSource, distillation: Distillation) -> tuple[list[str], list[str]]:
    """Return the tokens of the labelled and of the unlabelled frames that take part.

    Raises:
        ContractError: there are none.
    """
    labelled = [token for token in source.tokens if token in source.labelled]
    unlabelled = [token for token in source.tokens if token not in source.labelled] if distillation.unlabelled else []
    if not labelled and not unlabelled:
        raise ContractError("no frame to train on: none has labels. Raise data.labels, or distil on all frames.")
    return labelled, unlabelled


def _counted(source: FrameSource, labelled: Sequence[str], unlabelled: Sequence[str]) -> str:
    """Return the numbers of frames that take part, in words."""
    hidden = sum(token in source.annotated for token in unlabelled)
    others = {"unlabelled": hidden, "unannotated": len(unlabelled) - hidden}
    *first, last = [f"{len(labelled):,} labelled", *(f"{count:,} {kind}" for kind, count in others.items() if count)]
    return f"{', '.join(first)} and {last} frames" if first else f"{last} frames"


def _invites_inventions(
    config: TrainingConfig, distillation: Distillation, labelled: Sequence[str], unlabelled: Sequence[str]
) -> str | None:
    """Return that on frames without labels nothing punishes objects that are not there, if so, and what to do."""
    drawn = unlabelled and not (labelled and config.labelled_share == 1)
    losses = distillation.configs.values()
    if not drawn or any(getattr(loss, name) > 0 for loss in losses for name in loss.negatives):
        return None
    return (
        f"{len(unlabelled):,} frames have no labels, and there no term punishes objects that the student invents: "
        f"{', '.join(distillation.configs)} look at features, or where objects are. Add {{name: soft}} or "
        "{name: x3kd, output: 1} to distill.losses, or set distill.frames: labelled."
    )


def training_dataset(
    recipe: TrainRecipe, source: FrameSource, detector: Detector, distillation: Distillation
) -> TrainingDataset:
    """Return the samples of a run, whose sensor files are there and whole.

    Raises:
        DataError: names every file that is not.
    """
    labelled, unlabelled = frames_to_train_on(source, distillation)
    view = loaded_view(detector.config, distillation.depth is not None, distillation.teachers.values())
    check_files(source, [*labelled, *unlabelled], view.sensors)
    training = recipe.training
    return TrainingDataset(
        source,
        view,
        frame_order(training, source, labelled, unlabelled, distillation.shuffle),
        recipe.augment,
        distillation.caches,
        training.seed,
        distillation.depth,
    )


def frame_order(
    config: TrainingConfig,
    source: FrameSource,
    labelled: Sequence[str],
    unlabelled: Sequence[str],
    shuffle: BlockShuffle | None,
) -> FrameOrder:
    """Return which frame stands at each position of the run.

    Raises:
        ContractError: classes are to be balanced, but no labelled frame has a box; or only labelled, or only unlabelled
            frames are to be drawn, of which there are none.
    """
    if config.labelled_share == 1 and not labelled:
        raise ContractError(
            "training.labelled_share is 1, but no frame has labels: set it to null, or raise data.labels."
        )
    if config.labelled_share == 0 and not unlabelled:
        raise ContractError(
            "training.labelled_share is 0, but no frame without labels takes part: set it to null, lower data.labels, "
            "or distil with distill.frames: all."
        )
    if config.balanced:
        labels = {token: set(source.annotations(token).labels.tolist()) for token in labelled}
        labelled = balance(labels, config.seed)
        if not labelled:
            raise ContractError(
                "training.balanced: no labelled frame has a box. Set it to false, or raise data.labels."
            )
    return FrameOrder(labelled, unlabelled, config.labelled_share, config.seed, shuffle)


def open_run(
    objective: Objective | SegmenterObjective,
    recipe: TrainRecipe | SegmenterRecipe,
    facts: Mapping[str, object],
    run: Path,
    resume: bool,
    device: torch.device,
    in_loop: InLoop | None = None,
    terms: Terms | None = None,
) -> tuple[Trainer, int]:
    """Return the trainer of a run folder, which is made if it is not there, and the step that it goes on from.

    Args:
        facts: what weights and checkpoints say about themselves, beside the recipe.
        in_loop: None if the recipe has no evaluation.
        terms: None leaves the terms of the objective as they are.

    Raises:
        ConfigError: an evaluation in the loop is asked for that the recipe does not describe.
    """
    if recipe.training.evaluate_every and in_loop is None:
        raise ConfigError(
            "training.evaluate_every needs 'evaluation', which this recipe does not have: add it, or set 0."
        )
    # One key only: safetensors writes several in an order of chance, and equal runs would have unequal files.
    metadata = {"bevkd": json.dumps({"recipe": digest(recipe), **facts}, sort_keys=True)}
    stored = {**json.loads(json.dumps(facts)), "recipe": recipe.model_dump(mode="json")}
    trainer = Trainer(objective, recipe.training, run, device.type, metadata, stored, in_loop, terms)
    prepare_run(run, recipe, resume)
    return trainer, trainer.resume()


def close_run(summary: RunSummary) -> RunSummary:
    """Keep the summary of a run in its folder, and return it."""
    if is_main_process():
        write_atomic(summary.run / "result.json", json.dumps(summary.to_json(), indent=1).encode())
    if distributed.is_initialized():
        distributed.destroy_process_group()
    return summary


def loaded_view(config: DetectorConfig, cached_depth: bool, teachers: Iterable[LiveTeacher] = ()) -> View:
    """Return what training loads from sensor files: for the detector, and for teachers that run beside it."""
    own = replace(view_of(config), sensors=config.training_sensors - ({"lidar_depth"} if cached_depth else set()))
    views = [own, *(teacher.view for teacher in teachers)]
    sized = next((view for view in views if "camera" in view.sensors), own)
    return replace(sized, sensors=frozenset().union(*(view.sensors for view in views)))


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
