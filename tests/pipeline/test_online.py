"""Distillation with the teacher within the step: what it shares with a cache, and what it refuses."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from bevkd.cache.spec import CacheSpec
from bevkd.config import read_yaml
from bevkd.grid import BEVGrid
from bevkd.testing.frames import MadeUpFrames
from bevkd.testing.tools import batch_of
from bevkd.training.checkpoint import Checkpoints
from pipeline.online import OnlineTeacher, open_teachers
from pipeline.recipe import load_student
from tests.pipeline import kit
from tests.pipeline.kit import Bevkd
from tests.pipeline.symmetric import SymmetricTeacher

EXACT = {
    "name": "exact",
    "block": 2,
    "signals": {
        **{name: {"encoding": "float16"} for name in ("bev_low", "bev_high", "heatmap", "box_code")},
        **{name: {"encoding": "float16"} for name in ("points_low", "points_high")},
        "boxes": {"encoding": "boxes", "min_score": 0.0},
    },
}
"""Holds every signal of a teacher of half precision as it is."""

TURNED = {"bev": {"flip": True, "quarter_turns": True}}
MAPS, POINTS = (
    {"name": "unidistill", "teacher": "lidar", "feature": 1, "relation": 1, "response": 1, "source": source}
    for source in ("maps", "points")
)
X3KD = {"name": "x3kd", "teacher": "lidar", "score": 0.1}


@pytest.fixture(scope="module", autouse=True)
def plugged() -> Iterator[None]:
    """Let recipes name the symmetric teacher."""
    installed = importlib.metadata.entry_points

    def entry_points(**selection: Any) -> Any:
        own = importlib.metadata.EntryPoint("symmetric", "tests.pipeline.symmetric", "bevkd.teachers")
        return (*installed(**selection), own) if selection == {"group": "bevkd.teachers"} else installed(**selection)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.metadata, "entry_points", entry_points)
        yield


@pytest.fixture(scope="module")
def teacher(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the recipe that caches the symmetric teacher, exactly."""
    folder = tmp_path_factory.mktemp("symmetric")
    spec = kit.write(folder / "spec.yaml", EXACT)
    changes = {"teacher": {"name": "symmetric", "grid": kit.GRID}}
    return kit.write(folder / "cache.yaml", kit.synthetic_recipe(world, spec, **changes))


@pytest.fixture(scope="module")
def exact_cache(bevkd: Bevkd, teacher: Path) -> Path:
    bevkd.well("cache-teacher", teacher, "--out", teacher.parent / "cache")
    return teacher.parent / "cache"


@pytest.fixture(scope="module")
def student(world: Path, teacher: Path, exact_cache: Path) -> Path:
    """Return the recipe of a student that may learn from the cache and from the teacher itself."""
    recipe = kit.distilled(kit.train_recipe(world, kit.STUDENT), exact_cache, (MAPS, X3KD))
    recipe["distill"]["online"] = {"lidar": str(teacher)}
    return kit.write(teacher.parent / "student.yaml", recipe)


def flat(text: str) -> str:
    """Return a message without the line breaks of the terminal."""
    return " ".join(text.split())


def online(bevkd: Bevkd, student: Path, out: Path, *changes: object) -> kit.Outcome:
    """Return the outcome of a run with the teacher within the step."""
    return bevkd("train-student", student, "--out", out, "--set", "distill.teacher=online", *changes)


def worst(one: Path, other: Path) -> float:
    """Return the largest difference of a loss term between two runs, relative to terms above 1."""
    pairs = list(zip(kit.losses(one), kit.losses(other), strict=True))
    terms = [name for name in pairs[0][0] if name == "loss" or "/" in name]
    return max(abs(left[name] - right[name]) / max(1.0, abs(left[name])) for left, right in pairs for name in terms)


# ---------------------------------------------------------------------------------------------- the same losses


@pytest.mark.parametrize("augment", [{}, TURNED], ids=["as they are", "turned"])
@pytest.mark.parametrize("steps", [10, pytest.param(50, marks=pytest.mark.slow)])
def test_a_teacher_in_the_step_gives_the_losses_of_its_exact_cache(
    bevkd: Bevkd, student: Path, tmp_path: Path, augment: dict[str, Any], steps: int
) -> None:
    # At a low rate, as every step magnifies what rounding makes of turned boxes.
    same = ("--set", f"training.steps={steps}", "--set", "training.learning_rate=2.0e-4")
    same = (*same, "--set", f"augment={json.dumps(augment)}")
    bevkd.well("train-student", student, "--out", tmp_path / "cached", *same)
    outcome = online(bevkd, student, tmp_path / "online", *same)
    assert outcome.code == 0, outcome.err
    assert len(kit.losses(tmp_path / "cached")) == steps
    assert worst(tmp_path / "cached", tmp_path / "online") < 1e-3


def test_points_of_boxes_are_sampled_where_the_augmented_boxes_are(bevkd: Bevkd, student: Path, tmp_path: Path) -> None:
    same = ("--set", f"augment={json.dumps(TURNED)}", "--set", f"distill.losses={json.dumps([POINTS])}")
    bevkd.well("train-student", student, "--out", tmp_path / "cached", *same)
    outcome = online(bevkd, student, tmp_path / "online", *same)
    assert outcome.code == 0, outcome.err
    assert kit.losses(tmp_path / "online")[0]["unidistill/feature"] > 0
    assert worst(tmp_path / "cached", tmp_path / "online") < 1e-3


# ---------------------------------------------------------------------------------------------- the same run


def test_the_weights_name_the_teacher_and_hold_none_of_it(bevkd: Bevkd, student: Path, tmp_path: Path) -> None:
    assert online(bevkd, student, tmp_path / "online").code == 0
    bevkd.well("train-student", student, "--out", tmp_path / "cached")
    with (
        safe_open(tmp_path / "online" / "model.safetensors", "pt") as taught,
        safe_open(tmp_path / "cached" / "model.safetensors", "pt") as read,
    ):
        facts = json.loads(taught.metadata()["bevkd"])
        assert sorted(taught.keys()) == sorted(read.keys())
    identity = SymmetricTeacher(BEVGrid(**kit.GRID), kit.CLASSES).identity
    assert facts["online"] == {"lidar": identity.fingerprint}
    assert facts["caches"] == {}


def test_a_run_that_was_stopped_goes_on_to_the_same_losses(
    bevkd: Bevkd, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    every = ("--set", "training.checkpoint_every=1")
    assert online(bevkd, student, tmp_path / "whole", *every).code == 0
    save, saved = Checkpoints.save, []

    def save_and_stop(self: Checkpoints, *arguments: Any) -> Any:
        save(self, *arguments)
        saved.append(arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", save_and_stop)
        assert online(bevkd, student, tmp_path / "stopped", *every).code != 0
    assert len(saved) == 1
    assert online(bevkd, student, tmp_path / "stopped", *every, "--resume").code == 0
    assert kit.losses(tmp_path / "stopped") == kit.losses(tmp_path / "whole")


# ---------------------------------------------------------------------------------------------- what is refused


def test_a_loss_without_a_teacher_is_refused(bevkd: Bevkd, student: Path, tmp_path: Path) -> None:
    outcome = online(bevkd, student, tmp_path / "run", "--set", "distill.online={}")
    assert outcome.code == 1
    assert "a loss reads the teacher 'lidar', given are: none. Set distill.online.lidar=RECIPE" in flat(outcome.err)
    assert not (tmp_path / "run").exists()


def test_everything_that_does_not_fit_is_said_at_once(bevkd: Bevkd, student: Path, tmp_path: Path) -> None:
    head = {**kit.HEAD, "tasks": [["car"]], "nms": {"type": "circle", "squared_distance": [4]}}
    changes = ("data.sweeps=2", "data.classes=[car]", "detector.grid.cell_m=3.2", f"detector.head={json.dumps(head)}")
    outcome = online(bevkd, student, tmp_path / "run", *(part for change in changes for part in ("--set", change)))
    assert outcome.code == 1
    said = flat(outcome.err)
    assert "data.sweeps: 1 in its recipe, 2 in the student's, whose frames both see: add --set data.sweeps=1" in said
    assert "classes: it has car, truck, pedestrian, bicycle, traffic_cone; wanted are car" in said
    assert "grid: it has" in said
    assert not (tmp_path / "run").exists()


def test_a_signal_that_is_not_in_the_spec_is_refused(
    bevkd: Bevkd, student: Path, teacher: Path, tmp_path: Path
) -> None:
    spec = kit.write(tmp_path / "spec.yaml", {**EXACT, "signals": {"boxes": EXACT["signals"]["boxes"]}})  # type: ignore[index]
    recipe = kit.write(tmp_path / "cache.yaml", {**read_yaml(teacher), "spec": str(spec)})
    outcome = online(bevkd, student, tmp_path / "run", "--set", f"distill.online.lidar={recipe}")
    assert outcome.code == 1
    assert "teacher 'lidar': bev_low is not in its spec 'exact'" in flat(outcome.err)


def test_a_camera_teacher_of_another_image_size_is_refused(
    bevkd: Bevkd, student: Path, teacher: Path, tmp_path: Path
) -> None:
    encoder = {**kit.STUDENT["encoder"], "image_width": 64, "key_frames": 2}  # type: ignore[dict-item]
    camera = {"name": "detector", "detector": {**kit.STUDENT, "encoder": encoder}}
    recipe = kit.write(tmp_path / "cache.yaml", {**read_yaml(teacher), "teacher": camera})
    outcome = online(bevkd, student, tmp_path / "run", "--set", f"distill.online.lidar={recipe}")
    assert outcome.code == 1
    assert "images: it takes 32 x 64 pixels, the student 32 x 96" in flat(outcome.err)
    assert "one of teacher and student looks back at the key frame before" in flat(outcome.err)


def test_a_camera_teacher_of_the_students_images_teaches(
    bevkd: Bevkd, student: Path, teacher: Path, tmp_path: Path
) -> None:
    camera = {"name": "detector", "detector": kit.STUDENT}
    recipe = kit.write(tmp_path / "cache.yaml", {**read_yaml(teacher), "teacher": camera})
    changes = ("--set", f"distill.online.lidar={recipe}", "--set", f"augment={json.dumps(TURNED)}")
    outcome = online(bevkd, student, tmp_path / "run", *changes)
    assert outcome.code == 0, outcome.err


def test_a_cache_by_option_has_no_place_beside_a_teacher(
    bevkd: Bevkd, student: Path, exact_cache: Path, tmp_path: Path
) -> None:
    outcome = online(bevkd, student, tmp_path / "run", "--cache", f"lidar={exact_cache}")
    assert outcome.code == 1
    assert "distill.teacher is online, which reads no cache" in flat(outcome.err)


# ---------------------------------------------------------------------------------------------- what losses get


def test_signals_are_those_that_the_spec_would_store() -> None:
    """Boxes above its score, at most as many as fit, in their order; box codes where objects are."""
    grid = BEVGrid(**kit.GRID)
    source = MadeUpFrames(kit.CLASSES, grid)
    teacher = SymmetricTeacher(grid, kit.CLASSES)
    batch = batch_of(source, teacher.view)
    written = teacher.infer(batch)
    assert written.boxes is not None
    low = float(written.boxes[0].scores.sort().values[2])
    spec = CacheSpec.model_validate(
        {
            "name": "some",
            "signals": {
                "boxes": {"encoding": "boxes", "min_score": low, "capacity": 4},
                "box_code": {"encoding": "sparse"},
            },
        }
    )
    taught = OnlineTeacher(teacher, spec, ("boxes", "box_code"))(batch)
    boxes = taught.boxes[0]
    assert len(boxes) == 4
    assert bool(torch.isin(boxes.scores, written.boxes[0].scores.topk(4).values).all())
    code, known = taught.warped("box_code")
    assert 0 < int(known.sum()) < known.numel()
    assert float(code.masked_fill(known[:, :, None], 0.0).abs().max()) == 0
    assert not code.is_inference()


def test_its_signals_let_gradients_reach_the_student() -> None:
    grid = BEVGrid(**kit.GRID)
    teacher = SymmetricTeacher(grid, kit.CLASSES)
    spec = CacheSpec.model_validate({"name": "some", "signals": {"bev_low": {"encoding": "root8"}}})
    low = OnlineTeacher(teacher, spec, ("bev_low",))(batch_of(MadeUpFrames(kit.CLASSES, grid), teacher.view))
    own = torch.ones_like(low.canonical.need("bev_low"), requires_grad=True)
    (own * low.canonical.need("bev_low")).sum().backward()
    assert own.grad is not None


def test_the_recipe_of_a_student_names_only_teachers_that_a_loss_reads(student: Path, teacher: Path) -> None:
    recipe = load_student(str(student), [f"distill.online.other={teacher}"])
    assert list(open_teachers(recipe)) == ["lidar"]
