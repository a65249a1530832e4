from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bevkd.cache import blocks

plans = given(samples=st.integers(1, 2000), block=st.integers(1, 1024))


@plans
def test_blocks_partition_the_tokens_in_order(samples: int, block: int) -> None:
    tokens = [str(index) for index in range(samples)]
    planned = [blocks.tokens_of(tokens, block, index) for index in range(blocks.count(samples, block))]
    assert [token for part in planned for token in part] == tokens


@plans
def test_only_the_last_block_may_be_shorter_and_none_is_empty(samples: int, block: int) -> None:
    sizes = [len(blocks.tokens_of(range(samples), block, index)) for index in range(blocks.count(samples, block))]
    assert all(size == block for size in sizes[:-1])
    assert 1 <= sizes[-1] <= block


@given(samples=st.integers(1, 2000), block=st.integers(1, 1024), data=st.data())
def test_a_sample_is_found_in_its_block_at_its_slot(samples: int, block: int, data: st.DataObject) -> None:
    tokens = [str(index) for index in range(samples)]
    sample = data.draw(st.integers(0, samples - 1))
    index, slot = blocks.locate(sample, block)
    assert blocks.tokens_of(tokens, block, index)[slot] == tokens[sample]


@pytest.mark.parametrize("index", [-1, 3])
def test_a_block_that_does_not_exist_is_refused(index: int) -> None:
    with pytest.raises(IndexError, match="of 3"):
        blocks.tokens_of("abcdefg", 3, index)
