"""Train a segmenter from annotated masks: a teacher for X-IS."""

from __future__ import annotations

from pathlib import Path

from bevkd.data.instances import InstanceDataset
from bevkd.errors import ConfigError
from bevkd.models.segmenter import Segmenter
from bevkd.progress import Progress, Silent
from bevkd.training.objective import SegmenterObjective
from pipeline.parts import choose_device, is_main_process
from pipeline.recipe import SegmenterRecipe
from pipeline.segmentation import evaluate_segmenter, open_checked, open_held_out
from pipeline.training import RunSummary, close_run, open_run, seed
from pipeline.validation import InLoop


def train_segmenter(recipe: SegmenterRecipe, run: Path, resume: bool, progress: Progress) -> RunSummary:
    """Train the segmenter of ``recipe`` in the folder ``run`` and evaluate it.

    Everything that may be wrong is found before the run folder is made, the evaluation's images included.
    """
    if recipe.training.balanced:
        raise ConfigError("training.balanced is for detectors: the frames of a segmenter are images. Set it to false.")
    seed(recipe.training)
    segmenter = Segmenter(recipe.segmenter, recipe.data.classes)
    source = open_checked(recipe.data)
    height, width = recipe.segmenter.image_height, recipe.segmenter.image_width
    dataset = InstanceDataset(source, height, width, recipe.augment, recipe.training.seed)
    evaluation = recipe.evaluation
    held_out = open_held_out(evaluation, segmenter.classes) if evaluation else None
    objective, facts = SegmenterObjective(segmenter), {"classes": segmenter.classes}
    in_loop = None
    if evaluation and held_out:
        in_loop = InLoop(
            lambda: evaluate_segmenter(segmenter, held_out, evaluation, Silent()) if is_main_process() else None
        )
    trainer, step = open_run(objective, recipe, facts, run, resume, choose_device(recipe.device), in_loop)
    progress.note(f"{len(source.tokens)} images" + (f", resuming at step {step}" if step else ""))
    cost = trainer.train(dataset, progress)

    report = None
    if evaluation and held_out and is_main_process():
        segmenter.load_state_dict(trainer.final_weights())
        report = evaluate_segmenter(segmenter, held_out, evaluation, progress)
    return close_run(RunSummary(run, cost, report))
