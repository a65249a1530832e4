"""A detector and a data set that take milliseconds: a few points on a 8 x 8 grid."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import Dataset

from bevkd.data.collate import Batch, Sample
from bevkd.distill.base import DistillLossConfig
from bevkd.geometry.affine import BEVAffine
from bevkd.grid import BEVGrid
from bevkd.models.detector import DetectorOutput
from bevkd.models.heads import center
from bevkd.progress import Silent
from bevkd.training.config import BalanceConfig, TrainingConfig
from bevkd.training.loop import Trainer
from bevkd.training.objective import Objective
from bevkd.training.terms import Terms
from bevkd.types import Boxes, Frame

GRID = BEVGrid(x_m=(-8, 8), y_m=(-8, 8), cell_m=2.0)
CLASSES = ("car", "cone")


class TinyDetector(nn.Module):
    """Counts points per cell, convolves, and drops out: it has parameters, buffers and a use for random state."""

    def __init__(self) -> None:
        super().__init__()
        self.config, self.classes = SimpleNamespace(grid=GRID), CLASSES
        self.encoder = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3))
        self.head = center.build(center.Config(tasks=(("car",), ("cone",)), channels=4), 4, GRID, CLASSES)

    def forward(self, batch: Batch) -> DetectorOutput:
        assert batch.points is not None
        assert batch.point_frame is not None
        cells = GRID.to_cells(batch.points[:, :2]).long()
        counts = torch.zeros(len(batch), 1, 8, 8)
        counts.index_put_(
            (batch.point_frame, torch.zeros_like(batch.point_frame), cells[:, 1], cells[:, 0]),
            torch.ones(len(cells)),
            accumulate=True,
        )
        bev = self.encoder(counts)
        return DetectorOutput(bev, bev, self.head(bev))

    def loss(self, output: DetectorOutput, batch: Batch) -> dict[str, Tensor]:
        found: dict[str, Tensor] = self.head.loss(output.head, self.head.targets(batch.boxes), batch.labelled)
        return found


class TinyFrames(Dataset[Sample]):
    """Ten frames, of which ``labelled`` carry labels; the position in the run decides frame and noise.

    Attributes:
        seen: positions in the order in which they were asked for.
    """

    def __init__(self, labelled: int = 10) -> None:
        self.labelled, self.seen = labelled, list[int]()

    def __getitem__(self, position: int) -> Sample:
        self.seen.append(position)
        index = position % 10
        generator = torch.Generator().manual_seed(position)
        points = torch.rand(20, 5, generator=generator) * 16 - 8
        values = torch.tensor([[index - 4.5, 4.5 - index, 0, 4, 2, 1.5, 0.1 * index, 1, 0]])
        boxes = Boxes(values, torch.tensor([index % 2]), torch.ones(1)) if index < self.labelled else None
        return Sample(Frame(f"frame{index}", position, points, boxes=boxes), BEVAffine.identity(), {})


class RemoteFrames(TinyFrames):
    """Frames that come over a network."""

    remote = True


class Killed(Exception):  # noqa: N818  it is no error of anybody's
    """Stands for a signal: nothing after it runs."""


class KilledAt(Silent):
    """Progress that ends the run in the middle of the step after ``steps``."""

    def __init__(self, steps: int) -> None:
        self._left = steps

    @contextlib.contextmanager
    def task(self, name: str, total: int, unit: str, done: int = 0) -> Iterator[KilledAt]:
        del name, total, unit, done
        yield self

    def advance(self, steps: int = 1, **figures: float) -> None:
        del figures
        if self._left == 0:
            raise Killed
        self._left -= steps


class PullConfig(DistillLossConfig):
    """Two weights, the second of which has two terms."""

    weights: ClassVar[tuple[str, ...]] = ("feature", "output")
    name: Literal["pull"] = "pull"
    feature: float = 1.0
    output: float = 1.0
    standardise: bool = False

    def signals(self) -> tuple[str, ...]:
        return ()


class Pull(nn.Module):
    """A loss that needs no teacher: it pulls features, through an adapter, and heatmaps to constants."""

    def __init__(self, config: PullConfig) -> None:
        super().__init__()
        self.config, self.adapter = config, nn.Conv2d(4, 4, 1)

    def forward(self, student: DetectorOutput, teacher: object, batch: Batch) -> dict[str, Tensor]:
        del teacher, batch
        config, heatmap = self.config, student.head.heatmap
        return {
            "feature": config.feature * (self.adapter(student.bev_low) - 1).abs().mean(),
            "output_low": config.output * heatmap.square().mean(),
            "output_high": config.output * (heatmap - 1).abs().mean(),
        }


def trainer(
    run: Path, pulled: PullConfig | None = None, balance: BalanceConfig | None = None, **changes: Any
) -> Trainer:
    """Return a trainer of a freshly seeded tiny detector in ``run``, distilled if it is ``pulled``."""
    values: dict[str, Any] = {"steps": 8, "batch_size": 2, "workers": 0, "log_every": 1, "learning_rate": 0.01}
    run.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    detector: Any = TinyDetector()
    losses: list[Any] = [("pull", "nobody", Pull(pulled))] if pulled else []
    silent: Any = lambda _: None  # noqa: E731
    objective = Objective(detector, losses, {"nobody": silent})
    config = TrainingConfig(**{**values, **changes})
    terms = Terms({"pull": pulled} if pulled else {}, balance, config.steps)
    return Trainer(objective, config, run, "cpu", {"recipe": "test"}, terms=terms)


def weights(run: Path) -> dict[str, Tensor]:
    """Return what a run left for evaluation."""
    return load_file(run / "model.safetensors")
