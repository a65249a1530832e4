"""Keys of the training that need the whole pipeline: evaluation in the loop, balanced classes, stages by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bevkd.models.weights import load_weights
from pipeline.evaluate import open_evaluation
from pipeline.recipe import load_student
from pipeline.trained import trained_detector
from pipeline.training import frame_order
from pipeline.validation import spread, validation_of
from tests.pipeline import kit
from tests.pipeline.kit import Bevkd


def changed(recipe: dict[str, Any], **training: Any) -> dict[str, Any]:
    return {**recipe, "training": {**kit.TRAINING, **training}}


@pytest.fixture(scope="module")
def run(bevkd: Bevkd, world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run that was evaluated at every step, with a moving average."""
    recipe = kit.evaluated(kit.train_recipe(world, kit.STUDENT), world)
    recipe["evaluation"]["frames"] = 1
    folder = tmp_path_factory.mktemp("in-loop")
    path = kit.write(folder / "recipe.yaml", changed(recipe, evaluate_every=1, ema=0.9))
    bevkd.well("train-student", path, "--out", folder / "run")
    return folder / "run"


def test_an_evaluated_run_logs_the_scores_and_names_its_best_step(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    scores = {line["step"]: line["validation/NDS"] for line in lines}
    result = json.loads((run / "result.json").read_text())
    best = min(step for step in scores if scores[step] == max(scores.values()))
    assert (result["best_step"], result["best_score"]) == (best, scores[best])


def test_the_best_weights_and_those_of_a_checkpoint_are_those_of_the_recipe(run: Path) -> None:
    recipe = load_student(str(run / "recipe.yaml"), [])
    import torch

    detector = trained_detector(recipe, str(run), torch.device("cpu"), "best")
    load_weights(run / "checkpoints" / "step_00000003" / "model.safetensors", detector)


def test_a_checkpoint_says_which_recipe_and_which_caches_it_is_of(run: Path) -> None:
    facts = json.loads((run / "checkpoints" / "step_00000003" / "checkpoint.json").read_text())
    assert facts["recipe"]["training"]["evaluate_every"] == 1
    assert (facts["step"], facts["caches"], facts["processes"]) == (3, {}, 1)


def test_evaluation_in_the_loop_changes_no_loss(bevkd: Bevkd, world: Path, run: Path, tmp_path: Path) -> None:
    path = kit.write(tmp_path / "recipe.yaml", changed(kit.train_recipe(world, kit.STUDENT), ema=0.9))
    bevkd.well("train-student", path, "--out", tmp_path / "run")
    plain = kit.losses(tmp_path / "run")
    assert [{name: line[name] for name in plain[0]} for line in kit.losses(run)] == plain
    assert kit.weights_of(tmp_path / "run") == kit.weights_of(run)


def test_evaluation_in_the_loop_needs_an_evaluation(bevkd: Bevkd, student_recipe: Path, tmp_path: Path) -> None:
    outcome = bevkd("train-student", student_recipe, "--out", tmp_path / "run", "--set", "training.evaluate_every=1")
    assert outcome.code == 1
    assert "training.evaluate_every needs 'evaluation'" in outcome.err
    assert not (tmp_path / "run").exists()


def test_a_part_that_is_not_there_is_named_before_the_run_folder_is_made(
    bevkd: Bevkd, student_recipe: Path, tmp_path: Path
) -> None:
    arguments = (
        "train-student",
        student_recipe,
        "--out",
        tmp_path / "run",
        "--set",
        "training.frozen=[encoder.backbon]",
    )
    outcome = bevkd(*arguments)
    assert outcome.code == 1
    assert "'encoder.backbon' is no part of this model; near are: encoder.backbone" in " ".join(outcome.err.split())
    assert not (tmp_path / "run").exists()


def test_a_student_trains_with_frozen_slow_and_recomputed_parts(bevkd: Bevkd, world: Path, tmp_path: Path) -> None:
    keys = {"frozen": ["encoder.backbone.embedder"], "learning_rates": {"encoder.backbone": 0.1}}
    runs = []
    for recompute in (False, True):
        recipe = changed(kit.train_recipe(world, kit.STUDENT), gradient_checkpointing=recompute, **keys)
        runs.append(tmp_path / str(recompute))
        bevkd.well("train-student", kit.write(tmp_path / "recipe.yaml", recipe), "--out", runs[-1])
    assert kit.losses(runs[0]) == kit.losses(runs[1])


def test_balanced_frames_are_labelled_ones(bevkd: Bevkd, world: Path, tmp_path: Path) -> None:
    del bevkd
    values = kit.evaluated(changed(kit.train_recipe(world, kit.STUDENT), balanced=True), world)
    recipe = load_student(str(kit.write(tmp_path / "recipe.yaml", values)), [])
    from bevkd.models.detector import Detector
    from bevkd.progress import Silent

    assert recipe.evaluation is not None
    source = open_evaluation(recipe.evaluation, Detector(recipe.detector, kit.CLASSES), Silent())
    labelled, other = source.tokens[:1], source.tokens[1:]
    order = frame_order(recipe.training, source, labelled, other, None)
    assert {order[position] for position in range(50)} == set(source.tokens)
    alone = frame_order(recipe.training, source, source.tokens, (), None)
    assert {alone[position] for position in range(50)} <= set(source.tokens)


def test_frames_of_an_evaluation_in_the_loop_are_spread_evenly() -> None:
    tokens = [str(index) for index in range(10)]
    assert spread(tokens, 3) == ("0", "3", "6")
    assert spread(tokens, None) == spread(tokens, 20) == tuple(tokens)


class Headline:
    def __init__(self, **scores: float) -> None:
        self.headline = scores


def test_the_score_is_nds_or_else_the_mean_of_the_headline() -> None:
    both, other = Headline(mAP=0.1, NDS=0.3), Headline(car=0.5, cyclist=0.1)
    assert validation_of(both).score == 0.3  # type: ignore[arg-type]
    assert validation_of(other).score == pytest.approx(0.3)  # type: ignore[arg-type]
    assert validation_of(Headline()).score is None  # type: ignore[arg-type]
    assert validation_of(both).figures == {"validation/mAP": 0.1, "validation/NDS": 0.3}  # type: ignore[arg-type]
