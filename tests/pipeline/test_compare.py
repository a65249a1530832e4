"""Runs side by side: what is paired, averaged and warned of, and how it is written."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bevkd.cache.reader import CacheReader
from bevkd.data.sources.nuscenes import CLASSES, Config, build
from bevkd.errors import ConfigError, ContractError
from bevkd.evaluation import nuscenes
from bevkd.types import Boxes
from pipeline.compare import Comparison, compare
from pipeline.compare_report import markdown
from pipeline.estimate import Estimate, t_quantile
from pipeline.figures import figures_of
from pipeline.recipe import StudentRecipe
from pipeline.runs import Run, read_runs
from tests.pipeline import kit
from tests.pipeline.kit import Bevkd, Synthetic

NOWHERE = Path("nowhere")
DISTILL = {"caches": {"lidar": "no/cache"}, "losses": list(kit.LOSSES)}
ERRORS = ("trans_err", "scale_err", "orient_err", "vel_err", "attr_err")


def metrics(ap: float, frames: int = 8) -> dict[str, Any]:
    """Return the report of a detector with one AP for cars at all distances, and none for trucks."""
    scores = {name: ap if name == "car" else 0.0 for name in CLASSES}
    return nuscenes.Report(
        mAP=ap / 10,
        NDS=ap / 2,
        tp_errors=dict.fromkeys(ERRORS, 1 - ap),
        per_class={
            name: {
                "ap": value,
                "ap_by_distance": {0.5: value / 2, 1.0: value, 2.0: value, 4.0: 1.5 * value},
                "errors": dict.fromkeys(ERRORS, 1 - value),
            }
            for name, value in scores.items()
        },
        classes_present=("car", "truck"),
        mean_ap_present=ap / 2,
        frames=frames,
    ).to_json()


def write_run(folder: Path, report: Mapping[str, Any] | None, distill: Any = None, **changes: Any) -> Path:
    """Write a run that was never trained.

    Args:
        changes: of the recipe, by path with ``__`` for dots; of ``teacher=True``, a run of train-teacher.
    """
    teacher = changes.pop("teacher", False)
    values = kit.evaluated(kit.train_recipe(NOWHERE, kit.STUDENT), NOWHERE) | {"distill": distill}
    values = json.loads(json.dumps(values))
    for path, value in changes.items():
        *parents, key = path.split("__")
        node = values
        for parent in parents:
            node = node[parent]
        node[key] = value
    recipe = StudentRecipe.model_validate(values).model_dump(mode="json")
    folder.mkdir(parents=True)
    kit.write(folder / "recipe.yaml", {key: value for key, value in recipe.items() if not teacher or key != "distill"})
    result = {"run": str(folder), "steps": recipe["training"]["steps"], "step_seconds": 0.5, "data_wait_fraction": 0.0}
    (folder / "result.json").write_text(json.dumps({**result, "peak_memory_bytes": 10**9, "metrics": report}))
    return folder


def seeds(folder: Path, *aps: float, **options: Any) -> list[Path]:
    """Write a run for each AP, with the seeds 0, 1, ..."""
    return [
        write_run(folder / f"seed-{seed}", metrics(ap), training__seed=seed, **options) for seed, ap in enumerate(aps)
    ]


def method(comparison: Comparison, name: str) -> dict[str, Any]:
    """Return the summary of a method."""
    (found,) = [each for each in comparison.to_json()["summary"] if each["method"] == name]
    return dict(found)


# ---------------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 8, 9, 30, 101])
@pytest.mark.parametrize("share", [0.6, 0.975, 0.9995])
def test_the_t_quantile_is_exact(share: float, freedom: int) -> None:
    from scipy.special import stdtrit

    assert t_quantile(share, freedom) == pytest.approx(float(stdtrit(freedom, share)), rel=1e-9)


def test_spread_is_the_sample_standard_deviation_and_the_interval_students_t() -> None:
    estimate = Estimate.of([1.0, 2.0, 6.0])
    assert estimate.mean == 3.0
    assert estimate.spread == pytest.approx(math.sqrt(7))
    assert estimate.interval == pytest.approx((3 - 4.302652730 * math.sqrt(7 / 3), 3 + 4.302652730 * math.sqrt(7 / 3)))


def test_a_single_run_has_no_spread() -> None:
    assert Estimate.of([2.0]) == Estimate(2.0, None, None)


# ---------------------------------------------------------------------------------------------- pairs


def test_gains_are_differences_of_equal_seeds(tmp_path: Path) -> None:
    seeds(tmp_path / "plain", 0.2, 0.4, 0.3)
    seeds(tmp_path / "kd", 0.3, 0.44, 0.36, 0.9, distill=DISTILL)
    comparison = compare([tmp_path])
    gain = method(comparison, "x3kd.output + unidistill")["gain"]
    # The fourth seed has no plain run. Differences of mean AP: half of 0.10, 0.04, 0.06.
    assert (gain["over"], gain["pairs"]) == ("plain", 3)
    assert gain["mean"]["mean_ap_present"] == pytest.approx(0.2 / 6)
    spread = math.sqrt(((0.05 - 0.1 / 3) ** 2 + (0.02 - 0.1 / 3) ** 2 + (0.03 - 0.1 / 3) ** 2) / 2)
    assert gain["spread"]["mean_ap_present"] == pytest.approx(spread)
    reach = 4.302652730 * spread / math.sqrt(3)
    assert gain["interval"]["mean_ap_present"] == pytest.approx([0.1 / 3 - reach, 0.1 / 3 + reach])
    assert gain["mean"]["trans_err"] == pytest.approx(-0.2 / 3)
    plain = method(comparison, "plain")
    assert plain["gain"] is None
    assert plain["mean"]["NDS"] == pytest.approx(0.15)
    assert plain["spread"]["NDS"] == pytest.approx(0.05)
    assert comparison.warnings == ()


@pytest.mark.parametrize(
    ("changes", "warning"),
    [
        ({"data__labels": 0.5}, "the labels differ: 0.1 (plain); 0.5 (x3kd.output + unidistill)"),
        ({"training__steps": 6}, "the steps differ: 3 (plain); 6 (x3kd.output + unidistill)"),
        ({"evaluation__data__split": "world_train"}, "the frames of the evaluation differ: "),
    ],
)
def test_unlike_runs_are_listed_and_warned_of_but_not_paired(
    tmp_path: Path, changes: dict[str, Any], warning: str
) -> None:
    seeds(tmp_path / "plain", 0.2)
    seeds(tmp_path / "kd", 0.3, distill=DISTILL, **changes)
    comparison = compare([tmp_path])
    assert len(comparison.to_json()["rows"]) == 2
    assert method(comparison, "x3kd.output + unidistill")["gain"] is None
    assert any(each.startswith(warning) for each in comparison.warnings)


@pytest.mark.parametrize(
    ("changes", "warning"),
    [
        ({"data__root": "elsewhere"}, "the training data differ: "),
        ({"training__learning_rate": 0.1}, "differ in more than distillation: training.learning_rate"),
    ],
)
def test_pairs_that_differ_in_more_than_distillation_are_warned_of(
    tmp_path: Path, changes: dict[str, Any], warning: str
) -> None:
    seeds(tmp_path / "plain", 0.2)
    seeds(tmp_path / "kd", 0.3, distill=DISTILL, **changes)
    comparison = compare([tmp_path])
    assert method(comparison, "x3kd.output + unidistill")["gain"]["pairs"] == 1
    assert [warning in each for each in comparison.warnings] == [True]


def test_teachers_stand_beside_students_without_gain_and_warning(tmp_path: Path) -> None:
    seeds(tmp_path / "plain", 0.2)
    seeds(tmp_path / "teacher", 0.8, teacher=True, data__labels=1.0, training__steps=9)
    comparison = compare([tmp_path])
    assert [each.role for each in comparison.methods] == ["plain", "teacher"]
    assert method(comparison, "teacher (lift_splat)")["gain"] is None
    assert comparison.warnings == ()


def test_the_plain_student_of_the_same_recipe_is_found_among_several(tmp_path: Path) -> None:
    seeds(tmp_path / "slow", 0.2, training__learning_rate=0.1)
    seeds(tmp_path / "plain", 0.3)
    seeds(tmp_path / "kd", 0.5, distill=DISTILL)
    comparison = compare([tmp_path])
    gain = method(comparison, "x3kd.output + unidistill")["gain"]
    assert gain["over"] == "plain (learning_rate 0.003)"
    assert gain["mean"]["mean_ap_present"] == pytest.approx(0.1)


def test_several_plain_students_that_fit_alike_are_told_apart_by_the_caller(tmp_path: Path) -> None:
    seeds(tmp_path / "slow", 0.2, training__learning_rate=0.1)
    seeds(tmp_path / "fast", 0.3, training__learning_rate=0.2)
    seeds(tmp_path / "kd", 0.5, distill=DISTILL)
    unclear = compare([tmp_path])
    assert method(unclear, "x3kd.output + unidistill")["gain"] is None
    assert any("say by --plain which" in warning for warning in unclear.warnings)
    clear = compare([tmp_path], plain="plain (learning_rate 0.1)")
    assert method(clear, "x3kd.output + unidistill")["gain"]["mean"]["mean_ap_present"] == pytest.approx(0.15)
    with pytest.raises(ConfigError, match=r"no run is of the method 'nobody'. The methods are: plain \(learning_rate"):
        compare([tmp_path], plain="nobody")


def test_two_runs_of_one_seed_are_warned_of(tmp_path: Path) -> None:
    write_run(tmp_path / "a", metrics(0.2))
    write_run(tmp_path / "b", metrics(0.3))
    assert compare([tmp_path]).warnings == ("plain: 2 runs of seed 0, which are no independent samples",)


# ---------------------------------------------------------------------------------------------- reading runs


def labels(folder: Path) -> list[str]:
    return [run.method for run in read_runs([folder])]


def test_methods_are_called_by_the_terms_that_are_on(tmp_path: Path) -> None:
    first, second = kit.LOSSES
    cases = [
        ([first, {**second, "relation": 0}], "x3kd.output + unidistill.feature+response"),
        ([{**first, "output": 0, "feature": 1}], "x3kd.feature"),
        ([second, {**second, "teacher": "other"}], "unidistill + unidistill-2"),
    ]
    for number, (losses, _) in enumerate(cases):
        write_run(tmp_path / str(number), metrics(0.1), {"caches": {}, "losses": losses})
    assert labels(tmp_path) == [expected for _, expected in cases]


def test_methods_that_would_share_a_name_are_told_apart_by_what_differs(tmp_path: Path) -> None:
    strong = {"caches": {}, "losses": [{**kit.LOSSES[1], "feature": 50}]}
    weak = {"caches": {}, "losses": [{**kit.LOSSES[1], "feature": 0.5}]}
    seeds(tmp_path / "a", 0.1, 0.1, distill=strong)
    seeds(tmp_path / "b", 0.1, distill=weak)
    strong_name, weak_name = "unidistill (feature 50)", "unidistill (feature 0.5)"
    assert labels(tmp_path) == [strong_name, strong_name, weak_name]


def test_seed_and_places_do_not_part_a_group(tmp_path: Path) -> None:
    write_run(tmp_path / "a", metrics(0.1))
    write_run(tmp_path / "b", metrics(0.1), training__seed=4, training__workers=7, data__root="elsewhere")
    write_run(tmp_path / "c", metrics(0.1), training__learning_rate=1.0)
    first, second, third = (run.group for run in read_runs([tmp_path]))
    assert first == second != third


def test_runs_are_found_in_folders_of_runs(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "deep" / "er" / name, metrics(0.1)) for name in ("a", "b")]
    alone = write_run(tmp_path / "c", metrics(0.1))
    found = read_runs([alone, tmp_path / "deep", tmp_path / "deep" / "er" / "b"])
    assert [run.folder for run in found] == [alone, *runs]


def test_what_is_no_run_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError) as refused:
        read_runs([tmp_path / "empty", tmp_path / "absent"])
    assert f"{tmp_path / 'empty'}: no run in it" in str(refused.value)
    assert f"{tmp_path / 'absent'}: no such folder" in str(refused.value)


def test_unfinished_runs_are_named_or_left_out(tmp_path: Path) -> None:
    done, left = (write_run(tmp_path / name, metrics(0.1)) for name in ("done", "left"))
    (left / "result.json").unlink()
    with pytest.raises(ConfigError, match=r"no result.json. Finish them with --resume") as refused:
        read_runs([tmp_path])
    assert str(left) in str(refused.value)
    assert str(done) not in str(refused.value)
    assert [run.folder for run in read_runs([tmp_path], skip_unfinished=True)] == [done]


@pytest.mark.parametrize("content", ["{", "[]", '{"steps": 3}'])
def test_a_damaged_result_is_named(tmp_path: Path, content: str) -> None:
    (write_run(tmp_path / "run", metrics(0.1)) / "result.json").write_text(content)
    with pytest.raises(ConfigError, match=r"run/result.json"):
        read_runs([tmp_path])


def cached_run(tmp_path: Path, uri: Path, recorded: str) -> Run:
    """Return a run that read a cache and recorded its digest."""
    losses = [{"name": "unidistill", "teacher": "lidar", "feature": 1, "relation": 0, "response": 0}]
    folder = write_run(tmp_path / "run", metrics(0.1), {"caches": {"lidar": str(uri)}, "losses": losses})
    checkpoint = folder / "checkpoints" / "step_00000003"
    checkpoint.mkdir(parents=True)
    (checkpoint / "checkpoint.json").write_text(json.dumps({"step": 3, "caches": {"lidar": recorded}}))
    (run,) = read_runs([folder])
    return run


def test_cache_bytes_are_those_of_the_signals_that_the_losses_read(tmp_path: Path, synthetic: Synthetic) -> None:
    reader = CacheReader.open(synthetic.cache)
    run = cached_run(tmp_path, synthetic.cache, reader.manifest.name)
    assert run.cache_bytes_per_frame == reader.read_bytes(("bev_low",)) / len(reader.frames)
    assert run.caches[0].signals == ("bev_low",)


def test_bytes_of_a_cache_that_is_gone_or_another_are_unknown(tmp_path: Path, synthetic: Synthetic) -> None:
    gone = cached_run(tmp_path / "a", tmp_path / "nothing", "12ab")
    assert (gone.caches[0].digest, gone.cache_bytes_per_frame) == ("12ab", None)
    other = cached_run(tmp_path / "b", synthetic.cache, "12ab")
    assert (other.caches[0].digest, other.cache_bytes_per_frame) == ("12ab", None)


def test_a_plain_student_reads_no_cache(tmp_path: Path) -> None:
    (run,) = read_runs([write_run(tmp_path / "run", metrics(0.1))])
    assert run.cache_bytes_per_frame == 0


# ---------------------------------------------------------------------------------------------- metrics


def test_kitti_is_compared_by_its_moderate_ap(tmp_path: Path) -> None:
    level = {"easy": 0.9, "moderate": 0.6, "hard": None}
    report = {"ap_r40": {"Car": {"3D": level, "BEV": {**level, "moderate": 0.7}}, "Van": {"3D": dict.fromkeys(level)}}}
    report["ap_r40"]["Van"]["BEV"] = dict.fromkeys(level)
    write_run(tmp_path / "run", {**report, "frames": 4})
    (row,) = compare([tmp_path]).to_json()["rows"]
    assert row["mean_ap_3d_moderate"] == 0.6
    assert row["ap_bev_moderate_Car"] == 0.7
    assert "ap_3d_moderate_Van" not in row


def test_segmenters_are_compared_by_the_ap_of_masks(tmp_path: Path) -> None:
    score = {"ap": 0.5, "ap50": 0.7, "ap75": None}
    write_run(tmp_path / "run", {"mask": score, "box": score, "per_class": {"car": {"mask": score}}, "images": 3})
    (row,) = compare([tmp_path]).to_json()["rows"]
    assert (row["mask_ap"], row["mask_ap_car"]) == (0.5, 0.5)


def test_metrics_of_two_kinds_and_runs_without_any_are_refused(tmp_path: Path) -> None:
    score = {"ap": 0.5, "ap50": 0.7, "ap75": None}
    write_run(tmp_path / "a", metrics(0.1))
    masks = write_run(tmp_path / "b", {"mask": score, "box": score, "per_class": {}, "images": 3})
    with pytest.raises(ContractError, match="not of one kind") as refused:
        compare([tmp_path])
    assert f"{masks}: mask AP" in str(refused.value)
    silent = write_run(tmp_path / "c", None)
    with pytest.raises(ContractError, match="runs without metrics") as refused:
        compare([tmp_path])
    assert str(silent) in str(refused.value)


def test_ap_by_distance_is_the_mean_over_the_classes_present() -> None:
    figures = {figure.key: value for figure, value in figures_of(metrics(0.4)).items()}
    assert figures["ap_at_0.5_m"] == pytest.approx(0.1)
    assert figures["ap_at_4.0_m"] == pytest.approx(0.3)
    assert figures["ap_car"] == 0.4


# ---------------------------------------------------------------------------------------------- what is written


def test_rows_and_summary_have_the_documented_keys(bevkd: Bevkd, tmp_path: Path) -> None:
    seeds(tmp_path / "plain", 0.2, 0.3)
    seeds(tmp_path / "kd", 0.4, 0.5, distill=DISTILL)
    document = bevkd.well("compare", tmp_path, "--json").json
    assert [(row["method"], row["seed"]) for row in document["rows"]] == [
        ("plain", 0),
        ("plain", 1),
        ("x3kd.output + unidistill", 0),
        ("x3kd.output + unidistill", 1),
    ]
    costs = {"step_seconds", "peak_memory_bytes", "cache_bytes_per_frame"}
    wanted = {"run", "method", "role", "seed", "labels", "steps", "mean_ap_present", "mAP", "NDS", *ERRORS, *costs}
    assert all(wanted <= row.keys() for row in document["rows"])
    assert {
        "method",
        "role",
        "runs",
        "seeds",
        "mean",
        "spread",
        "interval",
        "gain",
        *costs - {"peak_memory_bytes"},
    } <= (document["summary"][1].keys())
    assert document["warnings"] == []


def test_the_tables_say_what_was_measured(bevkd: Bevkd, tmp_path: Path) -> None:
    seeds(tmp_path / "runs" / "plain", 0.2, 0.3)
    seeds(tmp_path / "runs" / "kd", 0.4, 0.56, distill=DISTILL, training__learning_rate=1.0)
    shown = bevkd.well("compare", tmp_path / "runs", "--out", tmp_path / "out").out
    text = (tmp_path / "out" / "table.md").read_text()
    assert (
        "| x3kd.output + unidistill | 2 | 24.0 ± 5.7 | 4.8 ± 1.1 | 24.0 ± 5.7 | 0.52 | 0.52 | 0.52 | 0.52 | 0.52 "
        "| +11.5 ± 2.1 | 0.5 | unknown |" in text
    )
    assert "| plain | 2 | 12.5 ± 3.5 |" in text
    assert "**Gain over plain.**" in text
    assert "- x3kd.output + unidistill and plain differ in more than distillation: training.learning_rate" in text
    assert "+11.5 ± 2.1" in shown
    assert "differ in more than distillation" in shown
    assert json.loads((tmp_path / "out" / "table.json").read_text())["summary"][1]["runs"] == 2
    assert (tmp_path / "out" / "table.png").read_bytes().startswith(b"\x89PNG")


def test_a_method_name_cannot_break_the_markdown_table(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", metrics(0.1), detector__head__nms={"type": "circle", "squared_distance": [4, 1]})
    comparison = compare([run])
    odd = comparison.methods[0].__class__(**{**vars(comparison.methods[0]), "name": "a|b"})
    assert "| a\\|b | 1 |" in markdown(Comparison((odd,), ()))


# ---------------------------------------------------------------------------------------------- bootstrap


def detected_run(folder: Path, world: Path, noise: float, **options: Any) -> Path:
    """Write a run with detections on the two training scenes, and their metrics."""
    source = build(Config(**kit.data(world)))
    random = torch.Generator().manual_seed(1)
    found = {}
    for token in source.tokens:
        truth = source.annotations(token)
        values = truth.values.nan_to_num()
        values[:, :2] += noise * torch.randn(len(values), 2, generator=random)
        found[token] = Boxes(values, truth.labels, torch.rand(len(values), generator=random))
    report = nuscenes.evaluate(source, found).to_json()
    write_run(folder, report, evaluation__data=kit.data(world), **options)
    nuscenes.save_detections(folder / "detections", source, found)
    return folder


def test_the_bootstrap_draws_the_same_scenes_for_all_runs(bevkd: Bevkd, world: Path, tmp_path: Path) -> None:
    detected_run(tmp_path / "plain", world, 1.5)
    detected_run(tmp_path / "same", world, 1.5, distill=DISTILL)
    document = bevkd.well("compare", tmp_path, "--bootstrap", 40, "--json").json
    plain, same = document["summary"]
    low, high = plain["scenes_interval"]
    assert low < plain["mean"]["mean_ap_present"] < high
    assert same["gain"]["scenes_interval"] == [0, 0]
    assert document["bootstrap"] == 40
    moved = tmp_path / "elsewhere"
    moved.symlink_to(world)
    again = bevkd.well(
        "compare", tmp_path / "plain", "--bootstrap", 40, "--set", f"evaluation.data.root={moved}", "--json"
    )
    assert again.json["summary"][0]["scenes_interval"] == [low, high]


def test_runs_without_detections_are_not_resampled(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", metrics(0.1))
    with pytest.raises(ContractError, match=r"run: has no detections.json"):
        compare([run], bootstrap=10)


def test_the_mean_of_draws_is_near_the_metric(world: Path, tmp_path: Path) -> None:
    from pipeline.compare import resampled
    from pipeline.runs import read_runs

    runs = read_runs([detected_run(tmp_path / "run", world, 1.0)])
    from bevkd.progress import Silent

    (drawn,) = resampled(runs, 200, (), Silent()).values()
    assert np.ptp(drawn) > 0
    assert runs[0].metrics is not None
    assert float(np.median(drawn)) == pytest.approx(runs[0].metrics["mean_ap_present"], abs=0.1)
