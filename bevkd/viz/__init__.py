"""Pictures for users: cameras, bird's-eye view, features, heatmaps and results.

The functions below take :mod:`bevkd.types` objects and plain values and return pictures; :func:`save` writes one.
Importing this package is cheap: the first use of a name loads matplotlib.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bevkd.viz.bev import draw_bev, draw_bev_panels
    from bevkd.viz.camera import draw_cameras
    from bevkd.viz.charts import draw_ap_bars, draw_curves
    from bevkd.viz.image import Picture, save
    from bevkd.viz.maps import draw_features, draw_heatmaps
    from bevkd.viz.methods import MethodScores, draw_methods
    from bevkd.viz.pages import DemoResults, FrameHeader, demo_pages, frame_page
    from bevkd.viz.style import ROLE_COLORS, ROLE_NAMES, Role

_HOMES = {
    "Role": "style",
    "ROLE_COLORS": "style",
    "ROLE_NAMES": "style",
    "Picture": "image",
    "save": "image",
    "draw_bev": "bev",
    "draw_bev_panels": "bev",
    "draw_cameras": "camera",
    "draw_features": "maps",
    "draw_heatmaps": "maps",
    "draw_ap_bars": "charts",
    "draw_curves": "charts",
    "MethodScores": "methods",
    "draw_methods": "methods",
    "FrameHeader": "pages",
    "DemoResults": "pages",
    "frame_page": "pages",
    "demo_pages": "pages",
}

__all__ = [
    "ROLE_COLORS",
    "ROLE_NAMES",
    "DemoResults",
    "FrameHeader",
    "MethodScores",
    "Picture",
    "Role",
    "demo_pages",
    "draw_ap_bars",
    "draw_bev",
    "draw_bev_panels",
    "draw_cameras",
    "draw_curves",
    "draw_features",
    "draw_heatmaps",
    "draw_methods",
    "frame_page",
    "save",
]


def __getattr__(name: str) -> Any:
    """Return a public name from the module that defines it."""
    if name not in _HOMES:
        raise AttributeError(f"module 'bevkd.viz' has no attribute '{name}'")
    return getattr(import_module(f"bevkd.viz.{_HOMES[name]}"), name)
