"""Masks that the world's cameras saw, through the encoding of the shipped spec."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask

from bevkd.cache.encoding import decode, encode
from bevkd.cache.shard import compress
from bevkd.cache.spec import load_spec
from bevkd.geometry.masks import spread
from bevkd.types import Instances


def seen(world: Path) -> Instances:
    """Return all objects in all images of a world, as one frame."""
    rows = json.loads((world / "v1.0-world" / "object_ann.json").read_text(encoding="utf-8"))
    masks = []
    for row in rows:
        code: dict[str, Any] = {**row["mask"], "counts": base64.b64decode(row["mask"]["counts"])}
        left, top, right, bottom = row["bbox"]
        inside = coco_mask.decode(code).astype(bool)[top:bottom, left:right]
        masks.append(torch.from_numpy(np.ascontiguousarray(inside)))
    n = len(rows)
    boxes = torch.tensor([row["bbox"] for row in rows], dtype=torch.float32)
    return Instances(torch.zeros(n).long(), boxes, torch.zeros(n).long(), torch.ones(n), tuple(masks))


def test_the_masks_of_the_world_fit_the_shipped_spec(world: Path) -> None:
    found = seen(world)
    assert len(found) > 20
    spec = load_spec("instances").signals["instances"].model_copy(update={"capacity": len(found)})
    encoded = encode("instances", spec, found, "t")
    assert encoded.error < 0.02
    assert sum(len(compress(array)) for array in encoded.arrays.values()) < 120 * len(found)
    stored = {name: torch.from_numpy(array)[None] for name, array in encoded.arrays.items()}
    restored = decode("instances", spec, stored)[0]
    assert isinstance(restored, Instances)
    assert torch.equal(restored.boxes, found.boxes)
    for exact, mask in zip(found.masks, restored.masks, strict=True):
        back = spread(mask, *exact.shape)
        assert int((exact & back).sum()) >= 0.85 * int((exact | back).sum())
