"""The demo: plenty of driving, few labels, and a teacher that is run once.

A LiDAR teacher learns from the labelled tenth of a generated world and is cached over all of it. Two camera students
with the same start, steps and seed follow: one learns from the labelled tenth, the other also from the cache.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bevkd.cache.catalogue import stored_bytes
from bevkd.cache.reader import CacheReader
from bevkd.data.collate import collate
from bevkd.data.join import FrameDataset
from bevkd.errors import TrainingError
from bevkd.models.detector import Detector, view_of
from bevkd.models.weights import load_weights
from bevkd.progress import Progress
from bevkd.training.tracking import read_log
from bevkd.types import Boxes
from pipeline.cache_teacher import cache_teacher
from pipeline.jobs import Job, run_jobs
from pipeline.parts import open_source
from pipeline.recipe import TrainRecipe, load_cache, load_student, load_train
from pipeline.train_teacher import train_teacher
from pipeline.world import make_world

if TYPE_CHECKING:
    from rich.table import Table

    from bevkd.viz import Role

ROLES: dict[str, Role] = {"teacher": "teacher", "plain": "student", "distilled": "distilled"}
"""Run folder of the demo, and the role it has in pictures."""

_REHEARSED_DRIVES, _REHEARSED_STEPS = 8, 10

STUDENTS = {"plain": "demo_student", "distilled": "demo_student_distilled"}
"""Run folder of each student, and its recipe."""


@dataclass(frozen=True)
class DemoResult:
    """What the demo found.

    Attributes:
        rows: per run its metrics, seconds per step and peak memory.
        cache_bytes_per_frame: of the teacher's cache.
        pictures: PNG files.
    """

    rows: dict[str, dict[str, Any]]
    cache_bytes_per_frame: float
    pictures: tuple[Path, ...]
    seconds: float

    @property
    def gain(self) -> float:
        """Mean AP over the classes present, distilled minus plain."""
        scores = {run: row["metrics"]["mean_ap_present"] for run, row in self.rows.items()}
        return float(scores["distilled"] - scores["plain"])

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of the table must know."""
        return (
            f"Distillation: {100 * self.gain:+.1f} points of mean AP.",
            "The distilled student also saw the nine tenths of the frames that have no labels, with boxes from the "
            "teacher: teacher-labelled frames are extra data, which the plain student does not have.",
            f"Pictures in {self.pictures[0].parent}: {', '.join(path.name for path in self.pictures)}.",
            f"{self.seconds / 60:.1f} minutes.",
        )

    def to_json(self) -> dict[str, Any]:
        """Return the result as plain values."""
        return {
            "rows": self.rows,
            "gain": self.gain,
            "cache_bytes_per_frame": self.cache_bytes_per_frame,
            "pictures": [str(path) for path in self.pictures],
            "seconds": self.seconds,
        }


def run_demo(out: Path, seed: int, progress: Progress, rehearsal: bool = False) -> DemoResult:
    """Tell the whole story in ``out``; what an earlier call finished is not done again.

    Args:
        rehearsal: a few drives and ten steps of each training, to see that everything works; nothing is learned.
    """
    started = time.monotonic()
    world, cache = out / "world", out / "cache"
    drives = _REHEARSED_DRIVES if rehearsal else 200
    settings = _overrides(world, seed, rehearsal)
    progress.note(f"1/5 a world: {drives} short drives, five classes, six cameras and a LiDAR")
    make_world(world, "demo", drives, 0, progress)

    progress.note("2/5 a LiDAR teacher, trained on the labelled tenth of the frames")
    teacher = load_train("demo_teacher", settings)
    if not _finished(out / "teacher"):
        train_teacher(teacher, out / "teacher", resume=True, progress=progress)

    progress.note("3/5 the teacher's knowledge of all frames, cached once")
    recipe = load_cache("demo_cache", [f"data.root={world}", f"teacher.run={out / 'teacher'}"])
    cache_teacher(recipe, str(cache), None, progress)

    progress.note("4/5 two camera students side by side: plain, and distilled from the cache")
    _train_students(out, cache, settings, progress)

    progress.note("5/5 pictures")
    rows = {run: json.loads((out / run / "result.json").read_text(encoding="utf-8")) for run in ROLES}
    pictures = _draw(out, teacher, load_student("demo_student", settings), rows)
    manifest = CacheReader.open(cache).manifest
    size = stored_bytes(manifest) / len(manifest.tokens)
    result = DemoResult(rows, size, pictures, time.monotonic() - started)
    (out / "result.json").write_text(json.dumps(result.to_json(), indent=1), encoding="utf-8")
    return result


def result_table(result: DemoResult) -> Table:
    """Return the demo's table."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(
        title="validation frames that no run has seen, objects within 25 m",
        caption="mean AP: over the classes that occur; mAP and NDS: nuScenes' own, over all ten classes",
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("")
    for heading in ("mean AP", "mAP", "NDS", "s/step", "peak GB", "cache kB/frame"):
        table.add_column(heading, justify="right")
    names = {"teacher": "LiDAR teacher", "plain": "plain student", "distilled": "distilled student"}
    for run, row in result.rows.items():
        metrics = row["metrics"]
        table.add_row(
            names[run],
            *(f"{100 * metrics[score]:.1f}" for score in ("mean_ap_present", "mAP", "NDS")),
            f"{row['step_seconds']:.3f}",
            f"{row['peak_memory_bytes'] / 1e9:.2f}",
            f"{result.cache_bytes_per_frame / 1e3:.0f}" if run == "distilled" else "",
        )
    return table


def _overrides(world: Path, seed: int, rehearsal: bool) -> list[str]:
    # Half precision is twice as fast where the processor has instructions for it, and far slower where it emulates.
    precision = "bf16" if torch.cuda.is_available() or torch.cpu._is_avx512_bf16_supported() else "no"
    return [
        f"data.root={world}",
        f"evaluation.data.root={world}",
        f"training.seed={seed}",
        f"training.precision={precision}",
        *([f"training.steps={_REHEARSED_STEPS}", "training.log_every=1"] if rehearsal else []),
    ]


def _finished(run: Path) -> bool:
    return (run / "result.json").exists()


def _train_students(out: Path, cache: Path, overrides: Sequence[str], progress: Progress) -> None:
    """Train both students at once, as the commands that a user would type, on one thread each."""
    settings = [part for override in overrides for part in ("--set", override)]
    caches = {"plain": [], "distilled": ["--cache", f"teacher={cache}"]}
    jobs = []
    for run, recipe in STUDENTS.items():
        if not _finished(out / run):
            arguments = [recipe, "--out", str(out / run), *caches[run], *settings]
            progress.note(f"$ bevkd train-student {' '.join(arguments)}")
            command = (sys.executable, "-m", "cli", "train-student", *arguments, "--resume")
            steps = load_student(recipe, overrides).training.steps
            jobs.append(Job(run, command, out / run, out / f"{run}.log", steps))
    failed = run_jobs(jobs, len(STUDENTS), (), progress)
    if failed:
        student = failed[0]
        raise TrainingError(
            f"the student '{student.name}' failed; the end of {student.log} says:\n{student.last_words}"
        )


def _draw(out: Path, teacher: TrainRecipe, student: TrainRecipe, rows: dict[str, dict[str, Any]]) -> tuple[Path, ...]:
    """Draw the frame with most objects nearby, as ground truth, teacher and students see it."""
    from bevkd.viz import DemoResults, demo_pages, save

    assert student.evaluation is not None
    source = open_source(student.evaluation.data, frozenset())
    token = max(source.tokens, key=lambda each: int((source.annotations(each).center.norm(dim=1) < 20).sum()))
    boxes: dict[Role, Boxes] = {"ground_truth": source.annotations(token)}
    features: dict[Role, torch.Tensor] = {}
    for run, role in ROLES.items():
        recipe = teacher if run == "teacher" else student
        detector = Detector(recipe.detector, tuple(recipe.data.classes)).eval()
        load_weights(out / run / "model.safetensors", detector)
        with torch.inference_mode():
            output = detector(collate([FrameDataset(source, [token], view_of(recipe.detector))[0]]))
        boxes[role] = detector.head.decode(output.head)[0]
        features[role] = output.bev_high[0]
    pages = demo_pages(
        DemoResults(
            frame=source.load(token, frozenset({"lidar", "camera"})),
            grid=student.detector.grid,
            classes=source.classes,
            boxes=boxes,
            features=features,
            ap={role: _ap(rows[run]["metrics"]) for run, role in ROLES.items()},
            losses={ROLES[run]: _curve(out / run) for run in STUDENTS},
            loss_title="Detection loss",
        )
    )
    return tuple(save(page, out / "pictures" / f"{name}.png") for name, page in pages.items())


def _ap(metrics: dict[str, Any]) -> dict[str, float]:
    """Return AP by class, for the classes that the frames hold."""
    return {name: metrics["per_class"][name]["ap"] for name in metrics["classes_present"]}


def _curve(run: Path, window: int = 25) -> list[tuple[int, float]]:
    """Return the detection loss by step, as a running mean over lines of the log that saw a labelled frame."""
    seen = [(line["step"], line["detection/heatmap"] + line["detection/box"]) for line in read_log(run)]
    seen = [(step, loss) for step, loss in seen if loss > 0]
    curve = []
    for index, (step, _) in enumerate(seen):
        recent = [loss for _, loss in seen[max(0, index - window + 1) : index + 1]]
        curve.append((step, sum(recent) / len(recent)))
    return curve
