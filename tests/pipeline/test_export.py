"""Students as ONNX files."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from bevkd.config import parse, read_yaml
from bevkd.data.collate import Batch
from bevkd.errors import BevkdError, ConfigError
from bevkd.export import agreement, check_exportable, decode, description, export, inputs_of, session
from bevkd.grid import BEVGrid
from bevkd.models.detector import Detector, DetectorConfig, view_of
from bevkd.models.weights import load_weights, save_weights
from bevkd.testing import MadeUpFrames
from bevkd.testing.tools import batch_of
from pipeline.bench.models import count_flops
from pipeline.recipe import load_student
from tests.docs.test_how_to import python
from tests.pipeline import kit
from tests.pipeline.kit import Bevkd

LOSSES = (
    {"name": "x3kd", "teacher": "lidar", "score": 0.1},
    {"name": "unidistill", "teacher": "lidar", "feature": 1, "relation": 1, "response": 1, "adapter": True},
)


def made_up(detector: dict[str, Any]) -> tuple[Detector, list[Batch]]:
    """Return a random detector and batches of one made-up frame each."""
    torch.manual_seed(0)
    made = Detector(parse(DetectorConfig, detector, "a test"), kit.CLASSES).eval()
    source = MadeUpFrames(kit.CLASSES, parse(BEVGrid, kit.GRID, "a test"))
    return made, [batch_of(source, view_of(made.config), [token]) for token in source.tokens]


def detector_of(run: Path) -> dict[str, Any]:
    """Return the detector of a run's recipe."""
    found: dict[str, Any] = read_yaml(run / "recipe.yaml")["detector"]
    return found


def read(path: Path) -> Any:
    import onnx

    return onnx.load(path)


# ---------------------------------------------------------------------------------------------- a distilled student


@pytest.fixture(scope="module")
def runs(bevkd: Bevkd, world: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return the runs of the same student, plain and distilled with adapters."""
    folder = tmp_path_factory.mktemp("runs")
    plain = kit.train_recipe(world, kit.STUDENT)
    for name, recipe in {"plain": plain, "distilled": kit.distilled(plain, cache, LOSSES)}.items():
        bevkd.well("train-student", kit.write(folder / f"{name}.yaml", recipe), "--out", folder / name)
    return folder / "plain", folder / "distilled"


@pytest.fixture(scope="module")
def exported(bevkd: Bevkd, runs: tuple[Path, Path]) -> tuple[Path, dict[str, Any]]:
    """Return the ONNX file of the distilled student, and what the command said about it."""
    out = runs[1].parent / "out" / "student.onnx"
    return out, bevkd.well("export", runs[1], "--out", out, "--json").json


def test_a_student_has_the_same_parameters_and_costs_with_and_without_distillation(runs: tuple[Path, Path]) -> None:
    shapes = []
    for run in runs:
        with safe_open(run / "model.safetensors", "pt") as file:
            shapes.append({name: file.get_slice(name).get_shape() for name in file.keys()})  # noqa: SIM118
    assert shapes[0] == shapes[1]
    assert len(shapes[0]) > 50
    flops = []
    for run in runs:
        config = detector_of(run)
        detector, batches = made_up(config)
        assert {name: list(value.shape) for name, value in detector.state_dict().items()} == shapes[0]
        with torch.no_grad():
            flops.append(count_flops(detector, batches[0]))
    assert flops[0] == flops[1] > 0


def test_the_file_agrees_with_torch_on_frames_of_the_data_set(exported: tuple[Path, dict[str, Any]]) -> None:
    path, said = exported
    assert said["relative"] <= 1e-4
    assert set(said["difference"]) == {"heatmap", "box_code"}
    assert len(said["checked"]) == 2
    assert said["bytes"] == path.stat().st_size
    assert said["inputs"]["images"] == [1, 6, 3, 32, 96]


def test_nothing_of_the_distillation_is_in_the_file(
    exported: tuple[Path, dict[str, Any]], runs: tuple[Path, Path]
) -> None:
    graph = read(exported[0]).graph
    detector, _ = made_up(detector_of(runs[1]))
    own = {name: each.numel() for name, each in [*detector.named_parameters(), *detector.named_buffers()]}
    weights = {each.name: int(np.prod(each.dims)) for each in graph.initializer}
    names = [*weights, *(node.name for node in graph.node), *(name for node in graph.node for name in node.output)]
    assert not [name for name in names if "adapter" in name or "teacher" in name or "loss" in name]
    named = {name.removeprefix("detector."): count for name, count in weights.items() if name.startswith("detector.")}
    # The exporter folds batch norms into the convolution before them, and calls what is left of one ..._bias.
    folded = {name for name in named if name.endswith(".weight_bias") and name.removesuffix("_bias") in own}
    assert {name: count for name, count in named.items() if name not in folded}.items() <= own.items()
    assert 0.9 < sum(named.values()) / exported[1]["parameters"] < 1


def test_the_file_says_what_it_is_and_no_folder_of_this_machine(
    exported: tuple[Path, dict[str, Any]], runs: tuple[Path, Path]
) -> None:
    about = description(session(exported[0]))
    assert about["classes"] == list(kit.CLASSES)
    assert about["head"]["tasks"] == kit.HEAD["tasks"]
    assert (about["opset"], about["part"]) == (18, "all")
    assert {entry.domain: entry.version for entry in read(exported[0]).opset_import}[""] == 18
    assert len(about["recipe"]) == len(about["weights_sha256"]) == 64
    content = exported[0].read_bytes()
    assert str(kit.ROOT).encode() not in content
    assert str(runs[1].parent).encode() not in content


def test_boxes_decoded_from_the_file_are_those_of_the_run(
    exported: tuple[Path, dict[str, Any]], runs: tuple[Path, Path]
) -> None:
    detector, _ = made_up(detector_of(runs[1]))
    running = session(exported[0])
    load_weights(runs[1] / "model.safetensors", detector)
    source = MadeUpFrames(kit.CLASSES, parse(BEVGrid, kit.GRID, "a test"), cameras=6)
    batch = batch_of(source, view_of(detector.config), source.tokens[:1])
    arrays = {name: tensor.numpy() for name, tensor in inputs_of(detector, batch, "all").items()}
    (found,) = decode(description(running), *running.run(["heatmap", "box_code"], arrays))
    with torch.no_grad():
        (wanted,) = detector.eval().head.decode(detector(batch).head)
    assert len(found) == len(wanted)
    torch.testing.assert_close(found.pack(), wanted.pack(), rtol=1e-4, atol=1e-4)


def test_boxes_are_decoded_as_the_how_to_says(
    exported: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(exported[0].parent)
    ((_, code),) = python("deploy")
    names: dict[str, Any] = {}
    exec(compile(code, "deploy.md", "exec"), names)
    assert len(names["boxes"]) == 1


def test_what_is_there_is_not_overwritten(bevkd: Bevkd, exported: tuple[Path, dict[str, Any]], runs: Any) -> None:
    outcome = bevkd("export", runs[1], "--out", exported[0])
    assert outcome.code == 1
    assert "exists. Remove it" in outcome.err


def test_weights_that_disagree_are_noticed(exported: tuple[Path, dict[str, Any]], runs: tuple[Path, Path]) -> None:
    detector, _ = made_up(detector_of(runs[1]))
    load_weights(runs[1] / "model.safetensors", detector)
    source = MadeUpFrames(kit.CLASSES, parse(BEVGrid, kit.GRID, "a test"), cameras=6)
    batch = batch_of(source, view_of(detector.config), source.tokens[:1])
    assert agreement(detector, batch, session(exported[0]), "all").relative < 1e-5
    with torch.no_grad():
        next(detector.head.parameters()).mul_(1.01)
    assert agreement(detector, batch, session(exported[0]), "all").relative > 1e-4


# ---------------------------------------------------------------------------------------------- refusals


def test_point_encoders_are_refused_and_the_way_out_is_named(bevkd: Bevkd, teacher: Path, tmp_path: Path) -> None:
    outcome = bevkd("export", teacher, "--out", tmp_path / "teacher.onnx")
    assert outcome.code == 1
    assert "encoder 'voxel'" in outcome.err
    assert "--part dense" in outcome.err
    assert not list(tmp_path.iterdir())


def test_unknown_operator_sets_are_refused() -> None:
    detector, _ = made_up(kit.STUDENT)
    with pytest.raises(BevkdError, match="opset 12: choose one from 18"):
        check_exportable(detector, "all", 12)


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    detector, batches = made_up(kit.STUDENT)
    there = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == "onnx":
            raise ImportError(name=name)
        return there(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"needs onnx, which is not installed: pip install 'bevkd\[export\]'"):
        export(detector, batches[0], tmp_path / "a.onnx", "all", 18, {})


# ---------------------------------------------------------------------------------------------- other students


@pytest.mark.slow
def test_bevdepth_with_two_key_frames_and_the_newest_operator_set_agrees_with_torch(tmp_path: Path) -> None:
    encoder = {
        **kit.STUDENT["encoder"],
        "depth_net": "camera_aware",
        "key_frames": 2,
        "aggregation": True,
        "frustum": "stretched",
        "depth_weight": 3.0,
        "norm": False,
    }
    detector, batches = made_up({**kit.STUDENT, "encoder": encoder})
    export(detector, batches[0], tmp_path / "a.onnx", "all", 20, {})
    running = session(tmp_path / "a.onnx")
    assert [each.name for each in running.get_inputs()][-1] == "view_from_original"
    assert max(agreement(detector, batch, running, "all").relative for batch in batches) < 1e-4


@pytest.mark.slow
def test_the_dense_part_of_a_point_detector_agrees_with_torch(bevkd: Bevkd, teacher: Path, tmp_path: Path) -> None:
    said = bevkd.well("export", teacher, "--out", tmp_path / "a.onnx", "--part", "dense", "--json").json
    assert said["relative"] < 1e-4
    assert said["inputs"] == {"bev_low": [1, 8, 32, 32]}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["nuscenes_student", "nuscenes_bevdepth"])
def test_full_size_students_agree_with_torch_on_a_real_frame(
    bevkd: Bevkd, real_data: Path, tmp_path: Path, recipe: str
) -> None:
    root = real_data / "nuscenes_mini_real"
    where = {"data.root": root, "data.version": "v1.0-mini", "data.split": "mini_train", "evaluation": "null"}
    given = [part for key, value in where.items() for part in ("--set", f"{key}={value}")]
    torch.manual_seed(0)
    loaded = load_student(recipe, given[1::2])
    weights = Detector(loaded.detector, loaded.data.classes).state_dict()
    save_weights(tmp_path / "random.safetensors", weights, {})
    arguments = ("--weights", tmp_path / "random.safetensors", "--out", tmp_path / "a.onnx", "--checks", 1, *given)
    assert bevkd.well("export", recipe, *arguments, "--json").json["relative"] < 1e-4
