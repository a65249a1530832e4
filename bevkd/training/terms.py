"""The terms of distillation under control: schedules, balance with detection, and warnings where one outgrows it.

A part is what one weight of one loss weighs: all terms that belong to it. What stands here runs on figures that the
loop has fetched for the step before; it waits for no device.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from bevkd.distill.base import DistillLossConfig
from bevkd.training.config import BalanceConfig

DETECTION = "detection"
WINDOW = 50
"""Steps whose medians count."""

PATIENCE = 20
"""Steps before anybody is warned."""

RATE = 0.05
"""Largest change of the logarithm of a part's balance in a step."""

LIMIT = 1e3
"""No balance is above it, or below one by it: a term that vanishes must not come back as noise."""

TOO_LARGE = 2.0
"""Times the detection loss: a part above it is warned of."""

_MEASURED = 3
"""Measured gradients before anybody is warned."""


class Terms:
    """Factors on the terms of a run's losses, and what their values have been.

    Args:
        losses: of each loss its config, by its label in the log, in the order of the recipe.
        balance: None leaves all weights as they are.
        steps: of the run.

    Attributes:
        warnings: all that were given, by kind: each once in a run.
    """

    def __init__(
        self,
        losses: Mapping[str, DistillLossConfig] | None = None,
        balance: BalanceConfig | None = None,
        steps: int = 1,
    ) -> None:
        self._losses, self._balance, self._steps = dict(losses or {}), balance, steps
        self._factors: dict[str, float] = {}
        self._recent: dict[str, deque[float]] = {}
        self._pulls: dict[str, deque[float]] = {}
        self.warnings: dict[str, str] = {}
        self._unsaid: list[str] = []

    def part_of(self, term: str) -> str:
        """Return the part that a logged term belongs to: ``label/weight``, of detection the whole."""
        label, _, name = term.partition("/")
        if label not in self._losses:
            return label
        weight = self._losses[label].weight_of(name)
        return term if weight is None else f"{label}/{weight}"

    def factors(self, names: Sequence[str], step: int) -> list[float]:
        """Return what each logged term is multiplied by at ``step`` (from 0)."""
        return [self._factors.get(self.part_of(name), 1.0) * self._scheduled(name, step) for name in names]

    def _scheduled(self, term: str, step: int) -> float:
        label, _, name = term.partition("/")
        return self._losses[label].factor_of(name, step / self._steps) if label in self._losses else 1.0

    def parts(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the sum of the terms' values of each part."""
        sums: dict[str, Any] = {}
        for name, value in values.items():
            part = self.part_of(name)
            sums[part] = sums[part] + value if part in sums else value
        return sums

    def take(self, values: Mapping[str, float], step: int) -> dict[str, float]:
        """Take the terms' values of ``step`` (from 0), before any factor, and return the balance for the log.

        A value of zero says nothing of a term's scale: it is of frames without labels, or without objects.
        """
        if not self._losses:
            return {}
        for part, value in self.parts(values).items():
            if value > 0:
                self._recent.setdefault(part, deque(maxlen=WINDOW)).append(value)
        taught = [part for part in self._recent if part != DETECTION]
        if DETECTION in self._recent:
            detection = statistics.median(self._recent[DETECTION])
            for part in taught if self._balance else ():
                self._move(part, detection)
            for part in taught:
                self._judge_value(part, detection, step)
        return {f"balance/{part}": factor for part, factor in self._factors.items()}

    def _move(self, part: str, detection: float) -> None:
        """Bring a part's factor nearer to where the part is between the limits; the first time, there at once."""
        assert self._balance is not None
        before = self._factors.get(part)
        value = statistics.median(self._recent[part])
        now = (before or 1.0) * value
        wanted = min(max(now, self._balance.least * detection), self._balance.most * detection) / value
        if before is not None:
            wanted = before * math.exp(min(max(math.log(wanted / before), -RATE), RATE))
        self._factors[part] = min(max(wanted, 1 / LIMIT), LIMIT)

    def _judge_value(self, part: str, detection: float, step: int) -> None:
        seen = min(len(self._recent[part]), len(self._recent[DETECTION]))
        if seen < PATIENCE:
            return
        factor = self.factors([part], step)[0]
        ratio = factor * statistics.median(self._recent[part]) / detection
        if ratio > TOO_LARGE:
            what = f"step {step + 1}: {part} is {ratio:.3g} times the detection loss, by medians of {seen} steps"
            self.warn(f"value of {part}", f"{what}, which may starve detection. {self._remedy(part, ratio)}")

    def take_gradients(self, norms: Mapping[str, float], step: int) -> dict[str, float]:
        """Take the norm of the gradient of each part at ``step``, as it joins the loss, and return them for the log."""
        found = {part: norm for part, norm in norms.items() if math.isfinite(norm)}
        detection = found.get(DETECTION, 0.0)
        for part, norm in found.items():
            if part == DETECTION or detection <= 0:
                continue
            pulls = self._pulls.setdefault(part, deque(maxlen=_MEASURED))
            pulls.append(norm / detection)
            ratio = statistics.median(pulls)
            if len(pulls) == _MEASURED and ratio > 1 and part.partition("/")[0] in self._losses:
                what = f"step {step + 1}: the gradient of {part} is {ratio:.3g} times that of detection"
                where = f"on the weights that they share, by the median of {_MEASURED} measurements"
                self.warn(f"gradient of {part}", f"{what} {where}. {self._remedy(part, ratio)}")
        return {f"gradient/{part}": norm for part, norm in found.items()}

    def _remedy(self, part: str, ratio: float) -> str:
        """Return which keys of the recipe to change, and to what."""
        label, _, weight = part.partition("/")
        config, key = self._losses[label], f"distill.losses.{list(self._losses).index(label)}"
        ways = []
        factor = self._factors.get(part, 1.0)
        if self._balance and factor != 1:
            bound = "least" if factor > 1 else "most"
            value = getattr(self._balance, bound)
            ways.append(f"lower distill.balance.{bound} from {value:g} to about {value / ratio:.2g}")
        elif weight in config.weights:
            value = getattr(config, weight)
            ways.append(f"lower {key}.{weight} from {value:g} to about {value / ratio:.2g}")
        if weight == "feature" and getattr(config, "standardise", True) is False:
            ways.append(f"set {key}.standardise: true")
        if self._balance is None:
            ways.append("set distill.balance: {}, which holds every term between 0.1 and 1 times detection")
        text = ", or ".join(ways)
        return f"{text[:1].upper()}{text[1:]}."

    def warn(self, kind: str, message: str) -> None:
        """Let the run say ``message``, unless it has said something of this kind."""
        if kind not in self.warnings:
            self.warnings[kind] = message
            self._unsaid.append(message)

    def unsaid(self) -> list[str]:
        """Return the warnings that have come up since the last call."""
        said, self._unsaid = self._unsaid, []
        return said

    def state(self) -> dict[str, Any]:
        """Return what a resumed run needs to go on as if it had not stopped."""
        return {
            "factors": dict(self._factors),
            "recent": {part: list(values) for part, values in self._recent.items()},
            "pulls": {part: list(values) for part, values in self._pulls.items()},
            "warnings": dict(self.warnings),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state`."""
        self._factors = dict(state["factors"])
        self._recent = {part: deque(values, maxlen=WINDOW) for part, values in state["recent"].items()}
        self._pulls = {part: deque(values, maxlen=_MEASURED) for part, values in state["pulls"].items()}
        self.warnings = dict(state["warnings"])
