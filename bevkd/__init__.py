"""Offline knowledge distillation for bird's-eye-view 3D object detection.

Stage 1 runs a teacher once and stores what it knows in a cache; stage 2 trains students from the cache, with no teacher
in memory. This package holds the parts; ``pipeline`` wires them together. Importing it loads none of its modules.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("bevkd")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+source"

__all__ = ["__version__"]
