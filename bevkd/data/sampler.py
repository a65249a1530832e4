"""The order of frames: a pure function of (seed, position), so that a resumed run needs nothing but its position."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch.utils.data import Sampler

_KEPT = 4
"""Permutations that an order keeps: of two streams, each around the end of an epoch."""


def mix(*numbers: int) -> int:
    """Return one 63-bit seed for several non-negative integers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


@dataclass(frozen=True)
class BlockShuffle:
    """Shuffling for a remote cache that is larger than its local copy: few blocks are in use at any time.

    Attributes:
        blocks: block of each token in the cache.
        window: blocks whose frames are shuffled together, before the next ones come.
    """

    blocks: Mapping[str, int]
    window: int

    def permutation(self, tokens: Sequence[str], seed: int, epoch: int) -> npt.NDArray[np.int64]:
        """Return an order of ``tokens``, as indices: blocks in random order, frames in random order within a window."""
        random = np.random.default_rng((seed, epoch))
        block_of = np.array([self.blocks[token] for token in tokens])
        order = random.permutation(np.unique(block_of))
        window_of = np.empty(int(block_of.max()) + 1, np.int64)
        window_of[order] = np.arange(len(order)) // self.window
        shuffled: npt.NDArray[np.int64] = np.lexsort((random.random(len(tokens)), window_of[block_of]))
        return shuffled


def balance(labels: Mapping[str, Collection[int]], seed: int) -> tuple[str, ...]:
    """Return tokens, repeated so that each class is as often the reason to take one (CBGS, arXiv 1908.09492).

    As published, every class draws with replacement among the tokens that hold it, its share of as many tokens as there
    are of all classes together; tokens of several classes count, and are drawn, once for each. Classes that nothing
    holds take no part, and tokens of no class are left out.

    Args:
        labels: classes that each token holds.
    """
    holders: dict[int, list[str]] = {}
    for token, own in labels.items():
        for label in own:
            holders.setdefault(label, []).append(token)
    random = np.random.default_rng(mix(seed, len(labels)))
    total = sum(map(len, holders.values()))
    return tuple(
        holders[label][index]
        for label in sorted(holders)
        for index in random.integers(len(holders[label]), size=total // len(holders))
    )


class FrameOrder:
    """Which frame stands at each position of an endless training run.

    Args:
        labelled, unlabelled: tokens of both kinds.
        labelled_share: share of positions that get a labelled frame, spread evenly; None shuffles all frames alike.
        seed: of the shuffles; every epoch over a stream is a new permutation.
        shuffle: None shuffles all frames of an epoch alike.
    """

    def __init__(
        self,
        labelled: Sequence[str],
        unlabelled: Sequence[str],
        labelled_share: float | None,
        seed: int,
        shuffle: BlockShuffle | None = None,
    ) -> None:
        self._shuffle = shuffle
        self._permutations: dict[tuple[int, int], npt.NDArray[np.int64]] = {}
        self._streams = (tuple(labelled), tuple(unlabelled))
        self._share, self._seed = labelled_share, seed
        if labelled_share is None or not unlabelled or not labelled:
            self._streams, self._share = ((*labelled, *unlabelled), ()), 1.0
        if not self._streams[0]:
            raise ValueError("no frames to order")

    def __getitem__(self, position: int) -> str:
        before, after = int(position * self._share), int((position + 1) * self._share)  # type: ignore[operator]
        stream, index = (0, before) if after > before else (1, position - before)
        tokens = self._streams[stream]
        epoch, offset = divmod(index, len(tokens))
        return tokens[int(self._permutation(stream, epoch)[offset])]

    def _permutation(self, stream: int, epoch: int) -> npt.NDArray[np.int64]:
        found = self._permutations.get((stream, epoch))
        if found is None:
            tokens, seed = self._streams[stream], mix(self._seed, stream)
            if self._shuffle is None:
                found = np.random.default_rng((seed, epoch)).permutation(len(tokens))
            else:
                found = self._shuffle.permutation(tokens, seed, epoch)
            if len(self._permutations) >= _KEPT:
                self._permutations.pop(next(iter(self._permutations)))
            self._permutations[stream, epoch] = found
        return found


class PositionSampler(Sampler[int]):
    """One process's share of positions ``start`` to ``stop``; the dataset turns a position into a sample.

    The order is global: each step's positions are dealt to the processes batch by batch, so a run gives the same
    samples per step wherever it was interrupted.
    """

    def __init__(self, start: int, stop: int, batch_size: int, rank: int = 0, processes: int = 1) -> None:
        self._positions = [
            position for position in range(start, stop) if (position - start) // batch_size % processes == rank
        ]

    def __iter__(self) -> Iterator[int]:
        return iter(self._positions)

    def __len__(self) -> int:
        return len(self._positions)
