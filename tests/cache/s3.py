"""What the tests of caches in object stores share."""

from __future__ import annotations

import os
from collections.abc import Mapping

import numpy as np

from bevkd.cache.manifest import Header
from bevkd.cache.store import open_store
from bevkd.cache.writer import CacheWriter
from tests.cache import kit


def content(uri: str) -> dict[str, bytes]:
    """Return the content of all objects of a cache."""
    store = open_store(uri)
    keys = [f"{folder}/{name}" for folder in store.folders() for name in store.sizes(folder)]
    return {key: store.read(key, 10**8) for key in [*store.sizes(""), *keys]}


def write(uri: str, environment: Mapping[str, str], described: Header, order: int = 1) -> None:
    """Write and seal a cache in a process of its own."""
    os.environ.update(environment)
    kit.write(uri, described, order)


def write_noisily(uri: str, environment: Mapping[str, str], described: Header, seed: int) -> None:
    """Write a cache with a teacher that is not deterministic."""
    os.environ.update(environment)
    rng = np.random.default_rng(seed)
    cache = CacheWriter.open(uri, described, kit.SHAPES)
    for block in cache.pending():
        cache.write_block(block, (_noisy(token, rng) for token in described.block_tokens(block)))
    cache.seal()


def _noisy(token: str, rng: np.random.Generator) -> dict[str, object]:
    sample = kit.sample(token)
    noise = {name: rng.uniform(0.9, 1, kit.SHAPES[name]).astype(np.float32) for name in kit.SHAPES}
    return {name: value * noise[name] if name in noise else value for name, value in sample.items()}
