"""Every published detector learns two real frames by heart: slow, since these are full-size networks."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from bevkd.config import apply_overrides, parse, read_yaml
from bevkd.data.collate import Batch, collate
from bevkd.data.join import TrainingDataset, View
from bevkd.data.sampler import FrameOrder
from bevkd.models.detector import Detector, channels_last, view_of
from bevkd.models.heads.center import NoNMS
from bevkd.types import Boxes, Frame
from bevkd.viz.camera import draw_cameras
from pipeline.parts import open_source
from pipeline.recipe import TrainRecipe

RECIPES = Path(__file__).resolve().parents[2] / "pipeline" / "recipes"

# The networks are as published; range and images are smaller, which changes no weight but makes seconds out of minutes.
NEAR = "detector.grid={x_m: [-13.2, 13.2], y_m: [-13.2, 13.2], z_m: [-5, 3], cell_m: 0.6}"
NEAR_8 = "detector.grid={x_m: [-16, 16], y_m: [-16, 16], z_m: [-5, 3], cell_m: 0.8}"
SMALL = ["detector.encoder.image_height=128", "detector.encoder.image_width=352"]
SMALL_FUSION = [each.replace("encoder", "encoder.camera") for each in SMALL]
ONE_KEY_FRAME = ["detector.encoder.key_frames=1", "detector.encoder.aggregation=false"]
CASES = {
    "nuscenes_teacher": ([NEAR], 60),
    "nuscenes_pillar": ([NEAR_8], 60),
    "nuscenes_student": ([NEAR, *SMALL], 90),
    "nuscenes_bevdepth": ([NEAR_8, *SMALL, *ONE_KEY_FRAME], 90),
    "nuscenes_fusion": ([NEAR, *SMALL_FUSION], 150),
}
FRAMES = (("v1.0-mini", "mini_train", "scene-0061"), ("v1.0-trainval", "val", "scene-0003"))


def load(name: str, overrides: Sequence[str], root: Path, index: Path) -> tuple[TrainRecipe, Batch, list[Frame]]:
    """Return a recipe, both frames as training sees them without augmentation, and both with images to draw on."""
    samples, pictures = [], []
    for version, split, scene in FRAMES:
        where = [f"data.root={root}", f"data.version={version}", f"data.split={split}", f"data.scenes=[{scene}]"]
        values = read_yaml(RECIPES / f"{name}.yaml")
        changes = [*overrides, *where, f"data.index_dir={index}", "data.skip_missing=true", "augment={}"]
        values = {key: value for key, value in values.items() if key != "distill"}
        recipe = parse(TrainRecipe, apply_overrides(values, [*changes, "evaluation=null"]), name)
        source = open_source(recipe.data, recipe.detector.training_sensors)
        view = view_of(recipe.detector)
        view = View(recipe.detector.training_sensors, view.image_height, view.image_width)
        samples.append(
            TrainingDataset(source, view, FrameOrder(source.tokens, [], None, 0, None), recipe.augment, {}, 0)[0]
        )
        pictures.append(source.load(source.tokens[0], frozenset({"camera"})))
    return recipe, collate(samples), pictures


def inside(boxes: Boxes, reach_m: float) -> Boxes:
    """Return the boxes that the cut grid can hold, with a cell to spare, as the head does not tell edges apart."""
    return boxes[(boxes.center[:, :2].abs() < reach_m).all(dim=1)]


def missed(found: Boxes, wanted: Boxes) -> int:
    """Return how many boxes have no found box of their class within half a metre."""
    distance = torch.cdist(wanted.center[:, :2], found.center[:, :2])
    distance[wanted.labels[:, None] != found.labels[None]] = torch.inf
    return int((distance.amin(dim=1) > 0.5).sum()) if len(found) else len(wanted)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_two_real_frames_are_learned_by_heart(name: str, real_data: Path, tmp_path: Path) -> None:
    overrides, steps = CASES[name]
    recipe, batch, frames = load(name, overrides, real_data / "nuscenes_mini_real", tmp_path)
    torch.manual_seed(0)
    detector = Detector(recipe.detector, tuple(recipe.data.classes)).train()
    channels_last(detector)
    optimizer = torch.optim.AdamW(detector.parameters(), lr=1e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    history: list[dict[str, float]] = []
    for _ in range(steps):
        terms = detector.loss(detector(batch), batch)
        loss = torch.stack([*terms.values()]).sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(detector.parameters(), 35.0)
        optimizer.step()
        schedule.step()
        history.append({key: round(value.item(), 4) for key, value in terms.items()})
        _keep(f"{name}.json", json.dumps(history).encode())
    # Batch norm sees both frames in training; its running statistics have not settled after so few steps.
    output = detector(batch).head
    found = detector.head.decode(output)
    # Barriers stand closer to each other than suppression allows; what was learned shows without it.
    detector.head.config = detector.head.config.model_copy(update={"nms": NoNMS(), "max_boxes": 500})
    everything = detector.head.decode(output)
    reach = recipe.detector.grid.x_m[1] - 1
    wanted = [inside(boxes, reach) for boxes in batch.boxes]
    misses = sum(missed(each, known) for each, known in zip(everything, wanted, strict=True))
    total = sum(map(len, wanted))
    for frame, boxes, known in zip(frames, found, wanted, strict=True):
        picture = draw_cameras(frame, {"ground_truth": known, "student": boxes}, detector.classes, min_score=0.3)
        content = io.BytesIO()
        picture.save(content, "PNG")
        _keep(f"{name}-{frame.token[:8]}.png", content.getvalue())
    assert history[-1]["heatmap"] < 0.3, history[-1]
    assert misses <= 0.05 * total, f"{misses} of {total} boxes missed"


def _keep(name: str, content: bytes) -> None:
    """Write what a person may want to look at to the folder $BEVKD_PICTURES, if there is one."""
    if folder := os.environ.get("BEVKD_PICTURES"):
        (Path(folder) / name).write_bytes(content)
