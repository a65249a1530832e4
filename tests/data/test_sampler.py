"""The order of frames is a pure function of (seed, position)."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bevkd.data.sampler import BlockShuffle, FrameOrder, PositionSampler, balance, mix

LABELLED = tuple(f"l{i}" for i in range(7))
UNLABELLED = tuple(f"u{i}" for i in range(31))


def first(order: FrameOrder, count: int) -> list[str]:
    return [order[position] for position in range(count)]


# ---------------------------------------------------------------------------------------------- frame order


@given(st.integers(0, 2**31), st.sampled_from([None, 0.0, 0.25, 0.5, 1.0]), st.permutations(range(60)))
def test_a_position_holds_the_same_frame_whatever_was_asked_before(
    seed: int, share: float | None, asked: list[int]
) -> None:
    in_order = first(FrameOrder(LABELLED, UNLABELLED, share, seed), 60)
    shuffled = FrameOrder(LABELLED, UNLABELLED, share, seed)
    assert {position: shuffled[position] for position in asked} == dict(enumerate(in_order))


@given(st.integers(0, 2**31), st.integers(1, 20))
def test_each_epoch_holds_every_frame_once(seed: int, count: int) -> None:
    tokens = [str(i) for i in range(count)]
    order = first(FrameOrder(tokens, (), None, seed), 3 * count)
    for epoch in range(3):
        assert sorted(order[epoch * count : (epoch + 1) * count]) == sorted(tokens)


def test_every_epoch_is_shuffled_anew_and_every_seed_differs() -> None:
    tokens = [str(i) for i in range(50)]
    order = first(FrameOrder(tokens, (), None, 0), 100)
    assert order[:50] != order[50:]
    assert order[:50] != tokens
    assert order != first(FrameOrder(tokens, (), None, 1), 100)


def test_without_a_share_all_frames_are_shuffled_alike() -> None:
    order = first(FrameOrder(LABELLED, UNLABELLED, None, 0), 38)
    assert sorted(order) == sorted([*LABELLED, *UNLABELLED])


@given(st.floats(0, 1), st.integers(1, 2000))
def test_the_share_of_labelled_frames_is_exact_at_every_length(share: float, count: int) -> None:
    order = first(FrameOrder(LABELLED, UNLABELLED, share, 0), count)
    found = sum(token.startswith("l") for token in order)
    assert found in {math.floor(count * share), math.floor(count * share + 1e-9), math.ceil(count * share - 1e-9)}


@given(st.sampled_from([0.1, 0.25, 0.3, 0.5, 0.9]), st.integers(0, 100_000))
def test_labelled_frames_are_spread_evenly(share: float, start: int) -> None:
    order = FrameOrder(LABELLED, UNLABELLED, share, 0)
    window = [order[position].startswith("l") for position in range(start, start + 40)]
    assert abs(sum(window) - 40 * share) < 1


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_each_stream_has_its_own_epochs(share: float) -> None:
    order = first(FrameOrder(LABELLED, UNLABELLED, share, 3), 400)
    for tokens, letter in ((LABELLED, "l"), (UNLABELLED, "u")):
        stream = [token for token in order if token.startswith(letter)]
        for start in range(0, len(stream) - len(tokens) + 1, len(tokens)):
            assert sorted(stream[start : start + len(tokens)]) == sorted(tokens)


@pytest.mark.parametrize(("labelled", "unlabelled"), [(LABELLED, ()), ((), UNLABELLED)])
def test_a_share_of_one_kind_that_does_not_exist_takes_the_other(
    labelled: tuple[str, ...], unlabelled: tuple[str, ...]
) -> None:
    order = first(FrameOrder(labelled, unlabelled, 0.5, 0), len(labelled) + len(unlabelled))
    assert sorted(order) == sorted([*labelled, *unlabelled])


def test_no_frames_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match="no frames"):
        FrameOrder((), (), None, 0)


# ---------------------------------------------------------------------------------------------- positions


@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 10), st.integers(0, 10))
def test_the_processes_share_all_positions_without_overlap(
    batch_size: int, processes: int, done: int, steps: int
) -> None:
    per_step = batch_size * processes
    start, stop = done * per_step, (done + steps) * per_step
    shares = [list(PositionSampler(start, stop, batch_size, rank, processes)) for rank in range(processes)]
    assert sorted(position for share in shares for position in share) == list(range(start, stop))
    assert {len(share) for share in shares} == {steps * batch_size}


@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 8))
def test_a_resumed_run_sees_per_step_what_the_whole_run_saw(batch_size: int, processes: int, done: int) -> None:
    per_step = batch_size * processes
    for rank in range(processes):
        whole = list(PositionSampler(0, 10 * per_step, batch_size, rank, processes))
        rest = list(PositionSampler(done * per_step, 10 * per_step, batch_size, rank, processes))
        assert rest == whole[done * batch_size :]


def test_each_step_takes_neighbouring_positions_batch_by_batch() -> None:
    assert list(PositionSampler(0, 12, 2, 0, 2)) == [0, 1, 4, 5, 8, 9]
    assert list(PositionSampler(0, 12, 2, 1, 2)) == [2, 3, 6, 7, 10, 11]


def test_its_length_is_the_count_of_its_positions() -> None:
    sampler = PositionSampler(4, 12, 2, 1, 2)
    assert len(sampler) == len(list(sampler)) == 4


# ---------------------------------------------------------------------------------------------- seeds


@given(st.lists(st.tuples(st.integers(0, 2**31), st.integers(0, 2**31)), min_size=2, max_size=20, unique=True))
def test_different_numbers_mix_to_different_seeds(pairs: list[tuple[int, int]]) -> None:
    seeds = [mix(*pair) for pair in pairs]
    assert len(set(seeds)) == len(pairs)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_mixing_is_the_same_on_every_machine() -> None:
    assert mix(0, 1) == 2_918_264_622_725_855_778


TOKENS = tuple(f"token-{index:03d}" for index in range(97))
BLOCKS = BlockShuffle({token: index // 8 for index, token in enumerate(TOKENS)}, window=3)


def test_a_block_shuffle_gives_every_frame_once_per_epoch_in_another_order() -> None:
    order = first(FrameOrder(TOKENS, (), None, 0, BLOCKS), 2 * len(TOKENS))
    once, again = order[: len(TOKENS)], order[len(TOKENS) :]
    assert set(once) == set(again) == set(TOKENS)
    assert once != again
    assert once != first(FrameOrder(TOKENS, (), None, 1, BLOCKS), len(TOKENS))
    assert once == first(FrameOrder(TOKENS, (), None, 0, BLOCKS), len(TOKENS))


def test_a_block_shuffle_needs_no_more_blocks_at_a_time_than_its_window() -> None:
    order = first(FrameOrder(TOKENS, (), None, 0, BLOCKS), len(TOKENS))
    blocks = [BLOCKS.blocks[token] for token in order]
    lives = [(blocks.index(block), len(blocks) - blocks[::-1].index(block)) for block in set(blocks)]
    for position in range(len(order)):
        assert sum(start <= position < stop for start, stop in lives) <= BLOCKS.window


def test_a_block_shuffle_mixes_the_blocks_of_a_window() -> None:
    order = first(FrameOrder(TOKENS, (), None, 0, BLOCKS), 24)
    changes = sum(BLOCKS.blocks[one] != BLOCKS.blocks[other] for one, other in pairwise(order))
    assert changes > 10


# ---------------------------------------------------------------------------------------------- balanced classes


def test_every_class_is_as_often_the_reason_to_take_a_frame() -> None:
    labels = {f"a{i}": {0} for i in range(90)} | {f"b{i}": {1} for i in range(9)} | {"c": {2}}
    drawn = balance(labels, 3)
    assert [sum(token.startswith(name) for token in drawn) for name in "abc"] == [33, 33, 33]
    assert set(drawn) <= set(labels)
    assert len({token for token in drawn if token.startswith("b")}) > 5


def test_a_frame_of_several_classes_counts_for_each_of_them() -> None:
    labels = {"both": {0, 5}, "one": {0}}
    drawn = balance(labels, 0)
    assert len(drawn) == 2
    assert drawn[1] == "both"


def test_frames_of_no_class_are_left_out_and_classes_of_no_frame_take_no_part() -> None:
    assert set(balance({"car": {0}, "empty": set(), "cone": {7}}, 0)) == {"car", "cone"}
    assert balance({"empty": set()}, 0) == ()


def test_the_draw_is_that_of_its_seed() -> None:
    labels = {str(index): {index % 3} for index in range(50)}
    assert balance(labels, 1) == balance(labels, 1) != balance(labels, 2)
