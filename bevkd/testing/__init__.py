"""What every plug-in has to hold, as tests: subclass a suite, say how your plug-in is built, and run pytest.

A suite is a plain class; nothing here imports pytest. ``class TestMine(TeacherTests)`` with the one method that it asks
for is a whole test module.
"""

from __future__ import annotations

from bevkd.testing.encoders import EncoderTests
from bevkd.testing.frames import MadeUpFrames
from bevkd.testing.heads import HeadTests
from bevkd.testing.losses import DistillLossTests
from bevkd.testing.sources import FrameSourceTests
from bevkd.testing.specs import CacheSpecTests
from bevkd.testing.teachers import TeacherTests
from bevkd.testing.tools import batch_of

__all__ = [
    "CacheSpecTests",
    "DistillLossTests",
    "EncoderTests",
    "FrameSourceTests",
    "HeadTests",
    "MadeUpFrames",
    "TeacherTests",
    "batch_of",
]
