"""The embedded driving world: a small, seeded, ray-cast data set in genuine nuScenes format."""

from bevkd.world.config import TRAIN_SPLIT, VAL_SPLIT, VERSION_FOLDER, WorldConfig, world_preset
from bevkd.world.writer import write_world

__all__ = ["TRAIN_SPLIT", "VAL_SPLIT", "VERSION_FOLDER", "WorldConfig", "world_preset", "write_world"]
