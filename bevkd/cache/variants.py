"""Frames that a cache holds several times: as they are, and flipped and turned. Imports nothing heavy.

A sample token says which: ``t`` is frame ``t`` as it is, ``t@r90x`` the same frame turned by 90 degrees and then
mirrored in x. To whoever knows no variants they are further samples.
"""

from __future__ import annotations

from collections.abc import Sequence

AS_IS = ""
"""The variant that every cache holds."""

VARIANTS = (AS_IS, "r90", "r180", "r270", "x", "r90x", "r180x", "r270x")
"""The eight symmetries of a square: ``r`` turns by so many degrees, counter-clockwise, then ``x`` mirrors x."""

_MARK = "@"


def variant_token(token: str, variant: str) -> str:
    """Return the sample token of a variant of frame ``token``."""
    return f"{token}{_MARK}{variant}" if variant else token


def split_token(token: str) -> tuple[str, str]:
    """Return frame and variant of a sample token of a cache that holds variants."""
    frame, mark, variant = token.rpartition(_MARK)
    return (frame, variant) if mark and variant in VARIANTS else (token, AS_IS)


def variants_in(tokens: Sequence[str]) -> tuple[str, ...]:
    """Return the variants of each frame among the samples of a cache, in their order; ("",) if it holds none."""
    held = set(tokens)
    return tuple(variant for variant in VARIANTS if variant_token(tokens[0], variant) in held)


def frames_in(tokens: Sequence[str]) -> tuple[str, ...]:
    """Return the tokens of frames as they are, without variants, in stored order."""
    return tuple(tokens[:: len(variants_in(tokens))])
