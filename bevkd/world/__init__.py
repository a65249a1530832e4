"""The embedded driving world: a small, seeded, ray-cast data set in genuine nuScenes format."""

from bevkd.world.config import TEST_SPLIT, TRAIN_SPLIT, VAL_SPLIT, VERSION_FOLDER, WorldConfig, world_preset
from bevkd.world.writer import write_world

__all__ = ["TEST_SPLIT", "TRAIN_SPLIT", "VAL_SPLIT", "VERSION_FOLDER", "WorldConfig", "world_preset", "write_world"]
