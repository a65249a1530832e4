"""A teacher and a student that train in a second on the embedded world, and the command line that runs them."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from safetensors.torch import load_file

import cli

ROOT = Path(__file__).resolve().parents[2]
CLASSES = ("car", "truck", "pedestrian", "bicycle", "traffic_cone")
GRID = {"x_m": [-25.6, 25.6], "y_m": [-25.6, 25.6], "z_m": [-5, 3], "cell_m": 1.6}
HEAD = {
    "name": "center",
    "channels": 8,
    "tasks": [["car", "truck"], ["pedestrian", "bicycle", "traffic_cone"]],
    "min_overlap": 0.3,
    "min_radius": 1,
    "max_boxes": 20,
    "nms": {"type": "circle", "squared_distance": [4, 1]},
}
BEV_ENCODER = {"layers": [0], "strides": [1], "channels": [8], "up_channels": [8]}
TEACHER = {
    "grid": GRID,
    "encoder": {"name": "voxel", "voxel_m": [0.8, 0.8, 1.0], "channels": [8, 8], "blocks": 1, "out_channels": 8},
    "bev_encoder": BEV_ENCODER,
    "head": HEAD,
}
STUDENT = {
    "grid": GRID,
    "encoder": {
        "name": "lift_splat",
        "backbone": {
            "model_type": "resnet",
            # Not narrower than 16: there oneDNN writes out of bounds in the backward pass of the 1x1 convolutions of
            # stride 2, in the channels-last layout (uxlfoundation/oneDNN#6035), and the process may crash.
            "options": {
                "embedding_size": 16,
                "hidden_sizes": [16, 16],
                "depths": [1, 1],
                "layer_type": "basic",
                "out_features": ["stage1", "stage2"],
            },
        },
        "image_height": 32,
        "image_width": 96,
        "stride": 8,
        "neck_channels": 8,
        "channels": 8,
        "depth": {"start": 2.0, "stop": 26.0, "step": 2.0},
        "norm": True,
    },
    "bev_encoder": BEV_ENCODER,
    "head": HEAD,
}
TRAINING = {"steps": 3, "batch_size": 2, "learning_rate": 0.003, "workers": 0, "log_every": 1}
LOSSES = (
    {"name": "x3kd", "teacher": "lidar", "score": 0.1},
    {"name": "unidistill", "teacher": "lidar", "feature": 1, "relation": 1, "response": 1},
)
SIGNALS = {
    "bev_low": {"encoding": "uint8"},
    "bev_high": {"encoding": "uint8"},
    "heatmap": {"encoding": "logit8"},
    "box_code": {"encoding": "float16"},
    "boxes": {"encoding": "boxes", "capacity": 50},
}


@dataclass(frozen=True)
class Outcome:
    """What a command printed, and its exit code."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one JSON document on stdout."""
        return json.loads(self.out)


class Bevkd:
    """Runs the command line, with a cache folder of its own."""

    def __init__(self, home: Path) -> None:
        self.home = home

    def __call__(self, *arguments: object) -> Outcome:
        """Return the outcome of a command that runs in this process."""
        out, err = io.StringIO(), io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            patch.setenv("XDG_CACHE_HOME", str(self.home))
            patch.setattr(sys, "argv", ["bevkd", *map(str, arguments)])
            with pytest.raises(SystemExit) as stopped:
                cli.main()
        code = stopped.value.code
        assert isinstance(code, int)
        return Outcome(code, out.getvalue(), err.getvalue())

    def well(self, *arguments: object) -> Outcome:
        """Return the outcome of a command that must succeed."""
        outcome = self(*arguments)
        assert outcome.code == 0, outcome.err
        return outcome

    def fresh(self, *arguments: object, before: str = "", after: str = "") -> Outcome:
        """Return the outcome of a command in an interpreter of its own.

        Args:
            before, after: Python that runs there before and after the command.
        """
        main = "import cli\ntry:\n    cli.main()\nexcept SystemExit as stopped:\n    code = stopped.code"
        return self.python(f"import sys\n{before}\n{main}\n{after}\nsys.exit(code)", *arguments)

    def python(self, code: str, *arguments: object) -> Outcome:
        """Return what ``code`` does in an interpreter of its own, at the root of the repository."""
        environment = {**os.environ, "XDG_CACHE_HOME": str(self.home), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", code, *map(str, arguments)]
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300
        )
        return Outcome(done.returncode, done.stdout, done.stderr)


def data(world: Path, **changes: Any) -> dict[str, Any]:
    """Return the data config of the world's training frames."""
    values = {
        "name": "nuscenes",
        "root": str(world),
        "version": "v1.0-world",
        "split": "world_train",
        "classes": list(CLASSES),
        "sweeps": 1,
    }
    return values | changes


def train_recipe(world: Path, detector: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    """Return the recipe of a run with half of the world's scenes labelled; without evaluation, which costs time."""
    values = {"data": data(world, labels=0.1), "detector": detector, "training": TRAINING, "device": "cpu"}
    return {**values, **changes}


def evaluated(recipe: Mapping[str, Any], world: Path) -> dict[str, Any]:
    """Return ``recipe`` with an evaluation on the world's validation frames."""
    return {**recipe, "evaluation": {"data": data(world, split="world_val")}}


def distilled(recipe: Mapping[str, Any], cache: Path, losses: Any = LOSSES) -> dict[str, Any]:
    """Return ``recipe`` with losses that read ``cache``."""
    return {**recipe, "distill": {"caches": {"lidar": str(cache)}, "losses": list(losses)}}


def cache_recipe(world: Path, run: Path, spec: Path, **changes: Any) -> dict[str, Any]:
    """Return the recipe that caches the teacher of ``run`` on all of the world's training frames."""
    values = {
        "data": data(world),
        "teacher": {"name": "detector", "run": str(run)},
        "spec": str(spec),
        "batch_size": 2,
        "loaders": 0,
        "device": "cpu",
    }
    return {**values, **changes}


class Synthetic(NamedTuple):
    """The recipe of a made-up teacher that caches every frame of the world as a block of its own, and its cache."""

    recipe: Path
    cache: Path


def synthetic_recipe(world: Path, spec: Path, **changes: Any) -> dict[str, Any]:
    """Return the recipe that caches a made-up teacher of small maps on all of the world's training frames."""
    teacher = {"name": "synthetic", "grid": GRID, "bev_low": 8, "bev_high": 8, "tasks": 2, "boxes": 10}
    values = {"data": data(world), "teacher": teacher, "spec": str(spec), "loaders": 0, "device": "cpu"}
    return {**values, **changes}


def spec(block: int = 2, signals: tuple[str, ...] = tuple(SIGNALS)) -> dict[str, Any]:
    """Return a cache spec."""
    return {"name": "tiny", "block": block, "signals": {name: SIGNALS[name] for name in signals}}


def write(path: Path, values: Mapping[str, Any]) -> Path:
    """Write a YAML file and return its path."""
    path.write_text(yaml.safe_dump(dict(values), sort_keys=False), encoding="utf-8")
    return path


def copy(world: Path, to: Path) -> Path:
    """Return a copy of a world whose files may be replaced (not written to: they share their content)."""
    shutil.copytree(world, to, copy_function=os.link)
    return to


def replace(path: Path, content: bytes) -> Path:
    """Give one file of a copy other content."""
    path.unlink()
    path.write_bytes(content)
    return path


def change_table(world: Path, name: str, change: Any) -> None:
    """Replace a table of a copied world by ``change`` of its records."""
    path = world / "v1.0-world" / f"{name}.json"
    replace(path, json.dumps(change(json.loads(path.read_bytes()))).encode())


def losses(run: Path) -> list[dict[str, float]]:
    """Return the loss fields of each line of a run's log: everything but the time that it took."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def weights_of(run: Path) -> dict[str, list[float]]:
    """Return the values of a run's final weights by name."""
    return {name: value.flatten().tolist() for name, value in load_file(run / "model.safetensors").items()}


def tree(path: Path) -> dict[str, bytes]:
    """Return the content of all files under ``path``."""
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}
