"""Names of what a teacher writes, a cache stores and a loss reads. Imports nothing heavy."""

from __future__ import annotations

BOX_FIELDS = ("x", "y", "z", "length", "width", "height", "yaw", "vx", "vy")
"""Values of a box: gravity centre m, size m, yaw rad, velocity m/s."""

MAPS = ("bev_low", "bev_high", "heatmap", "box_code")
"""Signals that are maps on the BEV grid."""

POINTS = {"points_low": "bev_low", "points_high": "bev_high"}
"""Signals that are samples of a map at the nine points of each annotated box, and that map."""

FROM_DATA = ("lidar_depth",)
"""Signals that come from the data set itself, whoever the teacher: stored so that stage 2 opens no point cloud."""

SIGNALS = (*MAPS, "boxes", *POINTS, "instances", *FROM_DATA)
"""Names of all signals."""
