"""What the sections of the report are made of: methods, tables by class, frames that are chosen."""

from __future__ import annotations

import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from bevkd.evaluation.ranges import match
from bevkd.types import Boxes
from bevkd.viz.html.element import markup
from pipeline.reporting.curves import curves_section
from pipeline.reporting.detections import Detections, Judged, with_evaluation
from pipeline.reporting.finding import finding_of, finding_section
from pipeline.reporting.frames import frame_outcome, pick_frames
from pipeline.reporting.methods import Scene, class_table, mean_class_table, scene_of
from pipeline.runs import Run
from tests.pipeline.test_compare import DISTILL, metrics, write_run


def runs_of(folder: Path, **methods: tuple[float, ...]) -> list[Run]:
    """Write runs of a score per seed for each method, and return them read."""
    from pipeline.runs import read_runs

    for name, scores in methods.items():
        role = name.rstrip("0123456789")
        for seed, score in enumerate(scores):
            options: dict[str, Any] = {"training__seed": seed, "teacher": role == "teacher"}
            losses = {**DISTILL, "frames": "labelled" if name == "distilled2" else "all"}
            distill = losses if role == "distilled" else None
            steps = {"training__steps": 7} if name == "plain2" else {}
            write_run(folder / f"{name}-{seed}", metrics(score), distill, **options, **steps)
    return read_runs([folder])


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return scene_of(
        runs_of(
            tmp_path_factory.mktemp("runs"),
            plain=(0.2, 0.22),
            distilled=(0.3, 0.33),
            distilled2=(0.4, 0.43),
            plain2=(0.1,),
            teacher=(0.8,),
        )
    )


def test_methods_stand_by_role_and_the_best_first(scene: Scene) -> None:
    assert [shown.role for shown in scene.methods] == ["plain", "plain", "distilled", "distilled", "teacher"]
    means = [shown.method.figures[scene.main].mean for shown in scene.methods if scene.main]
    assert means == pytest.approx([0.105, 0.05, 0.2075, 0.1575, 0.4])


def test_every_method_has_a_colour_of_its_own(scene: Scene) -> None:
    tones = [shown.tone for shown in scene.methods]
    assert tones == ["c-plain", "c-d2", "c-d0", "c-d1", "c-teacher"]


def test_the_finding_is_about_the_best_method_and_paired_runs(scene: Scene) -> None:
    finding = finding_of(scene)
    assert finding is not None
    assert finding.method.tone == "c-d0"
    assert finding.base.tone == "c-plain"
    assert finding.pairs == pytest.approx((10.0, 10.5))
    assert finding.gain == pytest.approx(10.25)
    assert finding.clear


def test_only_runs_with_a_partner_are_compared(tmp_path: Path) -> None:
    scene = scene_of(runs_of(tmp_path, plain=(0.2, 0.4), distilled=(0.3,)))
    finding = finding_of(scene)
    assert finding is not None
    assert finding.pairs == pytest.approx((5.0,))
    assert finding.best_mean - finding.base_mean == pytest.approx(5.0), "the second plain run has no partner"


@pytest.mark.parametrize(
    ("plain", "distilled", "said"),
    [
        ((0.20,), (0.30,), "one pair of runs, a hint and not a finding"),
        ((0.60, 0.40), (0.58, 0.48), "No clear difference"),
        ((0.40, 0.60), (0.48, 0.74), "2 pairs of runs are too few to be sure"),
        ((0.40, 0.42, 0.44), (0.60, 0.62, 0.66), "gains"),
        ((0.60, 0.62, 0.66), (0.40, 0.42, 0.44), "loses"),
        ((0.40,), (), "reaches 20.0 mean AP."),
        ((), (0.40,), "what distillation adds is not known"),
    ],
)
def test_the_sentence_claims_no_more_than_the_runs_show(
    tmp_path: Path, plain: tuple[float, ...], distilled: tuple[float, ...], said: str
) -> None:
    section = finding_section(scene_of(runs_of(tmp_path, plain=plain, distilled=distilled)))
    heading = re.search("<h1>(.*?)</h1>", markup(section.content))
    assert heading is not None
    assert said in re.sub("<[^>]*>", "", heading[1])


def run_with(values: dict[str, Any]) -> Run:
    return cast(Run, SimpleNamespace(metrics=values))


def test_tables_by_class_know_the_metrics_of_every_data_set() -> None:
    levels = {"easy": 0.5, "moderate": 0.4, "hard": None}
    kitti = class_table(run_with({"ap_r40": {"Car": {"3D": levels, "BEV": levels, "2D": levels}}}))
    assert list(kitti["Car"]) == ["3D easy", "3D moderate", "3D hard", "BEV easy", "BEV moderate", "BEV hard"]
    assert kitti["Car"]["3D easy"] == 50
    assert math.isnan(kitti["Car"]["3D hard"])
    masks = {"mask": {"ap": 0.25}, "box": {"ap": None}}
    segmenter = class_table(run_with({"mask": {}, "per_class": {"car": masks}}))
    assert segmenter["car"]["mask AP"] == 25
    nuscenes = class_table(run_with(metrics(0.2)))
    assert {name: scores["AP"] for name, scores in nuscenes.items()} == {"car": 20, "truck": 0}
    assert nuscenes["car"]["4 m"] == pytest.approx(30)


def test_a_mean_table_is_that_of_all_runs() -> None:
    mean = mean_class_table([run_with(metrics(0.2)), run_with(metrics(0.4))])
    assert mean["car"]["AP"] == pytest.approx(30)


def test_the_place_of_the_data_counts_for_the_evaluation_too() -> None:
    assert with_evaluation(["data.root=a", "data.labels=1"]) == [
        "evaluation.data.root=a",
        "data.root=a",
        "data.labels=1",
    ]


# ---------------------------------------------------------------------------------------------- frames


def boxes(*xs: float) -> Boxes:
    values = torch.zeros(len(xs), 9)
    values[:, 0], values[:, 3:6] = torch.tensor(xs), 1.0
    return Boxes(values, torch.zeros(len(xs), dtype=torch.int64), torch.full((len(xs),), 0.9))


def detections_of(scene: Scene, found: dict[str, list[Boxes]], truth: list[Boxes]) -> Detections:
    """Return detections of the first plain and distilled method, the same for each of their seeds."""
    tokens = tuple(f"frame-{index}" for index in range(len(truth)))
    source = SimpleNamespace(scene=lambda token: f"scene {int(token.partition('-')[2]) // 2}")
    judged = {}
    for role, each in found.items():
        outcome = match(truth, each, 1)
        for run in scene.of(role)[0].runs:  # type: ignore[arg-type]
            judged[run.folder] = Judged(dict(zip(tokens, each, strict=True)), outcome, 0.5)
    return Detections(cast(Any, source), cast(Any, None), tokens, dict(zip(tokens, truth, strict=True)), judged, 50, ())


@pytest.fixture
def detections(scene: Scene) -> Detections:
    truth = [boxes(1.0, 10.0, 20.0)] * 12
    plain = [boxes(1.0)] * 12
    distilled = [boxes(1.0), boxes(1.0, 10.0, 20.0), boxes(30.0, 35.0), *[boxes(1.0)] * 9]
    return detections_of(scene, {"plain": plain, "distilled": distilled}, truth)


def test_frames_show_the_extremes_and_chance(scene: Scene, detections: Detections) -> None:
    picks = pick_frames(scene, detections, 6)
    assert [pick.reason.split()[-2] for pick in picks] == ["gains", "loses", *["by"] * 4]
    assert [pick.index for pick in picks[:2]] == [1, 2]
    assert len({pick.index for pick in picks}) == 6


def test_scenes_are_repeated_only_when_there_is_no_other(scene: Scene, detections: Detections) -> None:
    scenes = [pick.index // 2 for pick in pick_frames(scene, detections, 6)]
    assert len(set(scenes)) == 6
    assert len(pick_frames(scene, detections, 12)) == 12


def test_chance_looks_at_tokens_alone(scene: Scene, detections: Detections) -> None:
    only = Scene(scene.of("distilled"), scene.main, scene.figures, ())
    without = pick_frames(only, detections, 4)
    assert {pick.reason for pick in without} == {"drawn by chance"}
    again = pick_frames(only, detections_of(scene, {"distilled": [boxes()] * 12}, [boxes(1.0)] * 12), 4)
    assert [pick.index for pick in again] == [pick.index for pick in without]


def test_a_frame_tells_right_from_false_and_found_from_missed() -> None:
    outcome = match([boxes(1.0, 10.0)], [boxes(40.0, 10.2)], 1)
    kept, right, counted, missed = frame_outcome(outcome, 0, 0.5)
    assert (kept.tolist(), right.tolist()) == ([0, 1], [False, True])
    assert (counted.tolist(), missed.tolist()) == ([0, 1], [True, False])
    assert len(frame_outcome(outcome, 0, 0.95)[0]) == 0


def test_steps_without_a_labelled_frame_are_no_success(tmp_path: Path) -> None:
    (run,) = runs_of(tmp_path, plain=(0.2,))
    lines = [f'{{"step": {step}, "detection/box": {0.0 if step % 2 else 5.0}}}' for step in range(20)]
    (run.folder / "log.jsonl").write_text("\n".join(lines) + "\n")
    page = str(curves_section(scene_of([run])).content)
    assert "plain student 5" in page
    assert "0 at step" not in page
