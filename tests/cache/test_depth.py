"""LiDAR depths in a cache."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bevkd.cache.encoding import decode, encode
from bevkd.cache.spec import SignalSpec, load_spec
from bevkd.errors import CacheError
from bevkd.types import LidarDepth

SPEC = SignalSpec(encoding="depth", capacity=500, max_error=0.01)


def depths(seed: int, count: int) -> LidarDepth:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.rand(count, 2, generator=generator) * torch.tensor([1600.0, 900])
    cameras = torch.randint(0, 6, (count,), generator=generator)
    return LidarDepth(cameras, pixels, 0.5 + 90 * torch.rand(count, generator=generator))


def stored(depth: LidarDepth, spec: SignalSpec = SPEC) -> LidarDepth:
    arrays = encode("lidar_depth", spec, depth, "t").arrays
    decoded = decode("lidar_depth", spec, {name: torch.from_numpy(array)[None] for name, array in arrays.items()})[0]
    assert isinstance(decoded, LidarDepth)
    return decoded


def rows(depth: LidarDepth) -> torch.Tensor:
    return torch.cat([1e4 * depth.cameras[:, None], depth.pixels, depth.depth_m[:, None]], dim=1)


@given(st.integers(0, 1000), st.integers(1, 500))
def test_every_depth_comes_back_within_an_eighth_of_a_pixel_and_a_centimetre(seed: int, count: int) -> None:
    given_depth = depths(seed, count)
    restored = stored(given_depth)
    assert len(restored) == count
    distance, partner = torch.cdist(rows(given_depth), rows(restored), compute_mode="donot_use_mm_for_euclid_dist").min(
        dim=1
    )
    assert distance.max() < 0.2
    assert len(set(partner.tolist())) == count
    assert (restored.depth_m[partner] - given_depth.depth_m).abs().max() <= 0.5 / 64 + 1e-4
    assert torch.equal(restored.cameras[partner], given_depth.cameras)


def test_no_depths_are_a_value_too() -> None:
    assert len(stored(depths(0, 0))) == 0


def test_too_many_and_impossible_values_are_refused() -> None:
    with pytest.raises(CacheError, match=r"501 returns.*capacity is 500"):
        stored(depths(0, 501))
    for value in (torch.nan, torch.inf, -1.0, 2000.0):
        broken = dataclasses.replace(depths(0, 3), depth_m=torch.tensor([1.0, value, 2.0]))
        with pytest.raises(CacheError, match="non-finite"):
            stored(broken)


def test_the_shipped_spec_holds_depth_alone() -> None:
    assert [*load_spec("lidar_depth").signals] == ["lidar_depth"]
