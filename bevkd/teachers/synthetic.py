"""A teacher that knows nothing: made-up signals, to try storage, clusters and scheduling before GPU hours are spent."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from bevkd.cache.manifest import TeacherIdentity
from bevkd.config import PluginConfig
from bevkd.data.collate import Batch
from bevkd.data.join import View
from bevkd.grid import BEVGrid
from bevkd.teachers.base import Teacher
from bevkd.types import Boxes, Signals

_CODE_SIZE = 10
_BACKGROUND_LOGIT = -6.0
_NOTHING = hashlib.sha256(b"no weights").hexdigest()


class Config(PluginConfig):
    """Shapes of the signals, and how long they take.

    Attributes:
        bev_low, bev_high: channels.
        tasks: of the box code.
        boxes: per frame.
        occupied: fraction of the cells that are not zero in ``bev_low``; in ``bev_high`` twice as many.
        seconds_per_frame: a batch takes at least this long per frame, as it would on the device of a real teacher.
        lidar: have the points of each frame loaded, which nothing looks at.
        seed: another seed is another teacher.
    """

    name: Literal["synthetic"] = "synthetic"
    grid: BEVGrid
    bev_low: int = Field(default=256, ge=1)
    bev_high: int = Field(default=512, ge=1)
    tasks: int = Field(default=6, ge=1)
    boxes: int = Field(default=40, ge=0)
    occupied: float = Field(default=0.2, gt=0, le=0.5)
    seconds_per_frame: float = Field(default=0.0, ge=0)
    lidar: bool = False
    seed: int = 0


class SyntheticTeacher:
    """Signals as a pure function of the frame's token: ReLU-sparse maps, and boxes with their heatmap and codes."""

    def __init__(self, config: Config, classes: tuple[str, ...], device: torch.device) -> None:
        self.classes, self.grid = classes, config.grid
        self.view = View(frozenset({"lidar"}) if config.lidar else frozenset())
        self.identity = TeacherIdentity(
            name=config.name,
            architecture=config.model_dump(mode="json", exclude={"seconds_per_frame"}),
            weights_sha256=_NOTHING,
            preprocessing={},
            origin="MADE UP, no network and no knowledge: for trying storage and clusters, useless for learning",
        )
        self._config, self._device = config, device
        self.shapes: Mapping[str, tuple[int, ...]] = {
            "bev_low": (config.bev_low, *self.grid.shape),
            "bev_high": (config.bev_high, *self.grid.shape),
            "heatmap": (len(classes), *self.grid.shape),
            "box_code": (config.tasks, _CODE_SIZE, *self.grid.shape),
        }

    @torch.inference_mode()
    def infer(self, batch: Batch) -> Signals:
        """Return the signals of a batch, on the teacher's device."""
        started = time.monotonic()
        frames = [self._frame(token) for token in batch.tokens]
        low, high, heatmap, code = (
            torch.stack(maps).to(self._device) for maps in zip(*(m for m, _ in frames), strict=True)
        )
        left = self._config.seconds_per_frame * len(batch) - (time.monotonic() - started)
        time.sleep(max(0.0, left))
        return Signals(low, high, heatmap, code, boxes=tuple(boxes.to(self._device) for _, boxes in frames))

    def _frame(self, token: str) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Boxes]:
        digest = hashlib.sha256(f"{self._config.seed} {token}".encode()).digest()
        chance = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        low = self._map(self._config.bev_low, self._config.occupied, chance)
        high = self._map(self._config.bev_high, 2 * self._config.occupied, chance)
        boxes = self._boxes(chance)
        cells = self.grid.to_cells(boxes.center[:, 0:2]).long().flip(-1)
        return (low, high, self._heatmap(boxes, cells, chance), self._code(boxes, cells)), boxes

    def _map(self, channels: int, occupied: float, chance: torch.Generator) -> Float[Tensor, "C Y X"]:
        """Return a map whose occupied cells cluster, with a magnitude per channel, half of their values cut by ReLU."""
        rows, columns = self.grid.shape
        coarse = torch.randn(1, 1, rows // 6 + 2, columns // 6 + 2, generator=chance)
        relief = torch.nn.functional.interpolate(coarse, (rows, columns), mode="bilinear")[0, 0]
        level = relief.flatten().kthvalue(max(1, math.ceil((1 - occupied) * relief.numel()))).values
        magnitude = torch.rand(channels, 1, 1, generator=chance) + 0.1
        values = torch.randn(channels, rows, columns, generator=chance).relu_()
        return values.mul_(magnitude).mul_(relief >= level)

    def _boxes(self, chance: torch.Generator) -> Boxes:
        count, grid = self._config.boxes, self.grid
        chances = torch.rand(count, 9, generator=chance)
        low = torch.tensor([grid.x_m[0], grid.y_m[0], -1.5, 0.5, 0.5, 1.0, -math.pi, -5.0, -5.0])
        high = torch.tensor([grid.x_m[1], grid.y_m[1], 0.5, 8.0, 2.5, 3.0, math.pi, 5.0, 5.0])
        labels = torch.randint(len(self.classes), (count,), generator=chance)
        return Boxes(low + chances * (high - low) * 0.999, labels, torch.rand(count, generator=chance))

    def _heatmap(self, boxes: Boxes, cells: Int[Tensor, "n 2"], chance: torch.Generator) -> Float[Tensor, "K Y X"]:
        heatmap = _BACKGROUND_LOGIT + torch.randn(self.shapes["heatmap"], generator=chance)
        heatmap[boxes.labels, cells[:, 0], cells[:, 1]] = boxes.scores.clamp(0.001, 0.999).logit()
        return heatmap

    def _code(self, boxes: Boxes, cells: Int[Tensor, "n 2"]) -> Float[Tensor, "T 10 Y X"]:
        code = torch.zeros(self.shapes["box_code"])
        offset = self.grid.to_cells(boxes.center[:, 0:2]) - cells.flip(-1)
        yaw = boxes.yaw[:, None]
        parts = [offset, boxes.center[:, 2:3], boxes.size.log(), yaw.sin(), yaw.cos(), boxes.velocity]
        code[boxes.labels % self._config.tasks, :, cells[:, 0], cells[:, 1]] = torch.cat(parts, dim=1)
        return code


def build(config: Config, classes: tuple[str, ...], device: torch.device) -> Teacher:
    """Return the teacher for a data set's classes."""
    return SyntheticTeacher(config, classes, device)
