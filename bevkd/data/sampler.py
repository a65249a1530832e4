"""The order of frames: a pure function of (seed, position), so that a resumed run needs nothing but its position."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from torch.utils.data import Sampler


def mix(*numbers: int) -> int:
    """Return one 63-bit seed for several non-negative integers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


@lru_cache(maxsize=8)
def _permutation(count: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng((seed, epoch)).permutation(count)


class FrameOrder:
    """Which frame stands at each position of an endless training run.

    Args:
        labelled, unlabelled: tokens of both kinds.
        labelled_share: share of positions that get a labelled frame, spread evenly; None shuffles all frames alike.
        seed: of the shuffles; every epoch over a stream is a new permutation.
    """

    def __init__(
        self, labelled: Sequence[str], unlabelled: Sequence[str], labelled_share: float | None, seed: int
    ) -> None:
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
        return tokens[int(_permutation(len(tokens), mix(self._seed, stream), epoch)[offset])]


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
