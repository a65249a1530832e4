"""Narrower models."""

from __future__ import annotations


def scaled(channels: int, factor: float) -> int:
    """Return ``factor`` times ``channels``, rounded to a multiple of 8, at least 8."""
    return max(8, round(channels * factor / 8) * 8)
