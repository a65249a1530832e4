"""Offline knowledge distillation for bird's-eye-view 3D object detection.

Stage 1 runs a teacher once and stores what it knows in a cache; stage 2 trains students from the cache, with no teacher
in memory. This package holds the parts; ``pipeline`` wires them together. Importing it loads none of its modules: the
names that training loops of one's own need are loaded when they are asked for.
"""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bevkd.cache.reader import CacheReader
    from bevkd.distiller import Distiller
    from bevkd.geometry.affine import BEVAffine
    from bevkd.grid import BEVGrid
    from bevkd.types import Boxes

try:
    __version__ = version("bevkd")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+source"

_HOMES = {
    "BEVAffine": "bevkd.geometry.affine",
    "BEVGrid": "bevkd.grid",
    "Boxes": "bevkd.types",
    "CacheReader": "bevkd.cache.reader",
    "Distiller": "bevkd.distiller",
}

__all__ = ["BEVAffine", "BEVGrid", "Boxes", "CacheReader", "Distiller", "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'bevkd' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
