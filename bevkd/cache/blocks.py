"""Which samples belong to which block: pure planning.

Axis 0 of every array is the sample in the order of the header's tokens. Block ``b`` holds the samples
``[b * block, (b + 1) * block)``; the last block may be shorter.
"""

from __future__ import annotations

from collections.abc import Sequence


def count(samples: int, block: int) -> int:
    """Return the number of blocks of ``block`` samples that hold ``samples`` samples."""
    return -(-samples // block)


def tokens_of(tokens: Sequence[str], block: int, index: int) -> tuple[str, ...]:
    """Return the tokens of block ``index``.

    Raises:
        IndexError: there is no such block.
    """
    if not 0 <= index < count(len(tokens), block):
        raise IndexError(f"block {index} of {count(len(tokens), block)}")
    return tuple(tokens[index * block : (index + 1) * block])


def locate(sample: int, block: int) -> tuple[int, int]:
    """Return the block of a sample and its slot in that block."""
    return divmod(sample, block)
