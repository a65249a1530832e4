"""Learning rate schedules in closed form: a resumed run needs nothing but its step."""

from __future__ import annotations

import math

from bevkd.training.config import TrainingConfig


def learning_rate_factor(config: TrainingConfig, step: int) -> float:
    """Return the learning rate of ``step`` (from 0) relative to the peak."""
    warmup = config.warmup * config.steps
    if step < warmup:
        rising = min((step + 1) / max(warmup, 1), 1.0)
        return 0.04 + 0.96 * (1 - math.cos(math.pi * rising)) / 2 if config.schedule == "one_cycle" else rising
    if config.schedule == "constant":
        return 1.0
    if config.schedule == "step":
        passed = sum(step >= milestone * config.steps for milestone in config.milestones)
        return float(0.1**passed)
    falling = (step - warmup) / max(config.steps - warmup, 1)
    return max((1 + math.cos(math.pi * falling)) / 2, 1e-4)
