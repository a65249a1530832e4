"""How the boxes of a cache score against ground truth: what the manifest says of it. Imports nothing heavy."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from bevkd.config import StrictModel

FLOOR = 0.01
"""Scores below it are noise whatever chance gives."""

CHANCE_FACTOR = 2.0
"""Scores below so many times what chance gives are noise."""

FEW = 20
"""On fewer frames scores say little: KITTI's AP of a perfect detector on five frames is 10 to 15 %."""

WHAT_TO_CHECK = (
    "Before you train on it, check that the checkpoint was loaded as a whole, that the classes stand in the teacher's "
    "order, that boxes are in the LiDAR frame with yaw counter-clockwise from +x and (length, width, height), and that "
    "sweeps and point features are those of the teacher's training. 'bevkd cache show' draws its boxes."
)

Name = Annotated[str, Field(min_length=1, max_length=64)]


class SelfCheck(StrictModel):
    """The scores of the cached boxes, found when the cache was sealed: a function of the boxes and the annotations.

    Attributes:
        scores: the headline numbers of the data set's metrics, by name; empty if the cache was not scored.
        by_chance: the same when every frame is given the boxes of another; empty for a single frame.
        frames: that were scored.
        max_distance_m: boxes this near to the ego were scored; None is the benchmark's own range.
        not_scored: why there are no scores.
    """

    scores: dict[Name, float] = Field(default_factory=dict, max_length=64)
    by_chance: dict[Name, float] = Field(default_factory=dict, max_length=64)
    frames: int = Field(default=0, ge=0)
    max_distance_m: float | None = None
    not_scored: str = Field(default="", max_length=400)

    @property
    def noise(self) -> bool:
        """Whether the boxes are scored, and no number is above ``FLOOR`` and clearly above what chance gives."""
        limits = {name: max(FLOOR, CHANCE_FACTOR * self.by_chance.get(name, 0.0)) for name in self.scores}
        return bool(self.scores) and all(value < limits[name] for name, value in self.scores.items())

    @property
    def summary(self) -> str:
        """The scores in one line, or why there are none."""
        if not self.scores:
            return f"not scored: {self.not_scored}"
        near = "" if self.max_distance_m is None else f" within {self.max_distance_m:g} m"
        chance = f" (by chance {_numbers(self.by_chance)})" if self.by_chance else ""
        return f"{_numbers(self.scores)} on {self.frames:,} frames{near}{chance}"

    @property
    def text(self) -> str:
        """The summary, and a second line for boxes that are noise."""
        if not self.noise:
            return self.summary
        few = " On so few frames good boxes may, too." if self.frames < FEW else ""
        return f"{self.summary}\nWARNING: these boxes score like noise.{few} {WHAT_TO_CHECK}"

    def to_json(self) -> dict[str, Any]:
        """Return the check as plain values, with what follows from it."""
        return self.model_dump(mode="json") | {"noise": self.noise}


def _numbers(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3g}" for name, value in values.items())
