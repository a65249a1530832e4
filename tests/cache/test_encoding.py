from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from bevkd.cache import arrays
from bevkd.cache.arrays import arrays_for
from bevkd.cache.encoding import Encoded, decode, encode
from bevkd.cache.quantise import Quantised, quantise
from bevkd.cache.spec import SignalSpec
from bevkd.errors import CacheError
from bevkd.geometry.masks import spread
from bevkd.types import Boxes, BoxPoints, Instances, LidarDepth, SparseMap

SHAPE = (3, 4, 5)
quick = settings(max_examples=60, deadline=None)


def maps(low: float, high: float) -> st.SearchStrategy[Any]:
    return hnp.arrays(np.float32, SHAPE, elements=st.floats(low, high, width=32))


def loose(name: str) -> SignalSpec:
    return SignalSpec.model_validate({"encoding": name, "max_error": 1})


def decoded(signal: str, spec: SignalSpec, encoded: Encoded) -> Any:
    return decode(signal, spec, {key: torch.from_numpy(value)[None] for key, value in encoded.arrays.items()})[0]


def boxes(count: int, scores: list[float] | None = None) -> Boxes:
    values = torch.arange(count * 9, dtype=torch.float32).reshape(count, 9)
    return Boxes(values, torch.arange(count) % 3, torch.tensor(scores) if scores else torch.linspace(1, 0.1, count))


@quick
@given(maps(-(2.0**15), 2.0**15))
def test_float16_rounds_to_half_precision(value: Any) -> None:
    spec = loose("float16")
    expected = value.astype(np.float16).astype(np.float32)
    assert np.array_equal(decoded("bev_low", spec, encode("bev_low", spec, value, "t")).numpy(), expected)


@quick
@given(maps(0, 2.0**20))
def test_uint8_is_within_half_a_level_or_one_where_it_saves_a_value_from_zero(value: Any) -> None:
    spec = loose("uint8")
    encoded = encode("bev_low", spec, value, "t")
    restored = decoded("bev_low", spec, encoded).numpy()
    scale = encoded.arrays["bev_low_scale"][:, None, None]
    near = np.abs(restored - value) <= scale * 0.5001
    assert (near | ((encoded.arrays["bev_low"] == 1) & (value < scale))).all()


@quick
@given(maps(-(2.0**20), 2.0**20))
def test_int8_is_within_half_a_level_and_keeps_the_sign(value: Any) -> None:
    spec = loose("int8")
    encoded = encode("bev_high", spec, value, "t")
    restored = decoded("bev_high", spec, encoded).numpy()
    assert (np.abs(restored - value) <= encoded.arrays["bev_high_scale"][:, None, None] * 1.0001).all()
    assert np.array_equal(np.sign(restored), np.sign(value))


@quick
@given(maps(0, 2.0**20), st.sampled_from(["uint8", "int8"]))
def test_exactly_the_zeros_are_zero(value: Any, name: str) -> None:
    spec = loose(name)
    encoded = encode("bev_low", spec, value, "t")
    assert np.array_equal(encoded.arrays["bev_low"] == 0, value == 0)
    assert np.array_equal(decoded("bev_low", spec, encoded).numpy() == 0, value == 0)


@quick
@given(maps(-40, 40))
def test_logit8_keeps_probabilities_within_one_percent(value: Any) -> None:
    spec = SignalSpec(encoding="logit8")
    restored = decoded("heatmap", spec, encode("heatmap", spec, value, "t"))
    before = torch.from_numpy(value)
    assert (restored.sigmoid() - before.sigmoid()).abs().max() <= 0.0103
    seen = (before.sigmoid() >= 0.001) & (before <= arrays.LOGIT_LIMIT)
    assert ((restored - before).abs()[seen] <= arrays.LOGIT_STEP * 0.5001).all()


@quick
@given(maps(-40, 40))
def test_logit8_floors_exactly_the_probabilities_under_a_thousandth(value: Any) -> None:
    stored = encode("heatmap", SignalSpec(encoding="logit8"), value, "t").arrays["heatmap"]
    assert np.array_equal(stored == 0, value.astype(np.float64) < arrays.LOGIT_FLOOR)


@quick
@given(maps(-100, 100), st.sampled_from(["float16", "root8", "int8"]))
def test_the_measured_error_is_the_error_of_what_is_read_back(value: Any, name: str) -> None:
    encoded = encode("bev_low", loose(name), value, "t")
    restored = decoded("bev_low", loose(name), encoded).double().numpy()
    norm = np.linalg.norm(value.astype(np.float64))
    if norm > 0:
        assert encoded.error == pytest.approx(np.linalg.norm(restored - value) / norm, rel=1e-4, abs=1e-9)
        assert encoded.cosine == pytest.approx(
            float((restored * value).sum()) / norm / max(float(np.linalg.norm(restored)), 1e-300), abs=1e-6
        )


@pytest.mark.parametrize(
    ("signal", "name", "shape"),
    [
        ("bev_low", "uint8", (3, 4, 5)),
        ("bev_high", "int8", (3, 4, 5)),
        ("heatmap", "logit8", (3, 4, 5)),
        ("box_code", "float16", (2, 10, 4, 5)),
        ("box_code", "int8", (2, 10, 4, 5)),
        ("bev_high", "root8", (3, 4, 5)),
        ("heatmap", "logits", (3, 4, 5)),
        ("box_code", "root8", (2, 10, 4, 5)),
        ("box_code", "sparse", (2, 10, 4, 5)),
        ("boxes", "boxes", ()),
        ("points_low", "float16", (9, 4)),
        ("points_high", "root8", (9, 4)),
        ("instances", "masks", ()),
        ("lidar_depth", "depth", ()),
    ],
)
def test_stored_arrays_are_the_declared_ones(signal: str, name: str, shape: tuple[int, ...]) -> None:
    spec = SignalSpec.model_validate({"encoding": name})
    values = (
        {
            "boxes": boxes(2),
            "points_low": points(3),
            "points_high": points(3),
            "instances": instances((5, 3)),
            "lidar_depth": LidarDepth(torch.tensor([1]), torch.tensor([[3.0, 4.0]]), torch.tensor([5.0])),
            "box_code": SparseMap(torch.rand(shape), torch.ones(4, 5) > 0) if name == "sparse" else torch.rand(shape),
        }
        if len(shape) != 3
        else {}
    )
    value = values.get(signal, torch.rand(shape))
    stored = encode(signal, spec, value, "t").arrays
    declared = {array.name: (array.shape, array.dtype) for array in arrays_for(signal, spec, shape)}
    assert {key: (array.shape, array.dtype.name) for key, array in stored.items()} == declared
    for array in arrays_for(signal, spec, shape):
        assert len(array.dims) == len(array.shape)
        assert array.nbytes == stored[array.name].nbytes


@pytest.mark.parametrize("name", ["float16", "root8", "uint8", "int8"])
def test_an_empty_map_is_exact(name: str) -> None:
    encoded = encode("bev_low", loose(name), torch.zeros(SHAPE), "t")
    assert encoded.error == 0
    assert encoded.cosine == 1
    assert not decoded("bev_low", loose(name), encoded).any()


def test_torch_and_numpy_give_the_same_bytes() -> None:
    value = torch.rand(SHAPE)
    spec = SignalSpec(encoding="uint8")
    for left, right in zip(
        encode("bev_low", spec, value, "t").arrays.values(),
        encode("bev_low", spec, value.numpy(), "t").arrays.values(),
        strict=True,
    ):
        assert left.tobytes() == right.tobytes()


def test_half_precision_and_strided_maps_with_gradients_are_taken() -> None:
    value = torch.rand(4, 5, 3, dtype=torch.bfloat16, requires_grad=True).permute(2, 0, 1)
    encoded = encode("bev_low", SignalSpec(encoding="float16"), value, "t")
    assert np.array_equal(encoded.arrays["bev_low"], value.detach().float().numpy().astype(np.float16))


def test_a_batch_decodes_like_its_samples() -> None:
    spec = SignalSpec(encoding="int8")
    encoded = [encode("bev_low", spec, torch.randn(SHAPE), "t") for _ in range(3)]
    batch = {
        key: torch.stack([torch.from_numpy(one.arrays[key]) for one in encoded]) for key in ("bev_low", "bev_low_scale")
    }
    together = decode("bev_low", spec, batch)
    assert all(torch.equal(together[i], decoded("bev_low", spec, one)) for i, one in enumerate(encoded))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["float16", "root8", "uint8", "int8", "logits", "logit8"])
def test_non_finite_values_are_refused(bad: float, name: str) -> None:
    value = torch.ones(SHAPE)
    value[1, 2, 3] = bad
    with pytest.raises(CacheError, match="heatmap of sample 'tok-7' has 1 non-finite values"):
        encode("heatmap", SignalSpec.model_validate({"encoding": name}), value, "tok-7")


def test_negative_values_in_uint8_are_refused_with_the_way_out() -> None:
    with pytest.raises(CacheError, match=r"'tok-7'.*negative.*Set signals\.bev_low\.encoding: int8"):
        encode("bev_low", SignalSpec(encoding="uint8"), torch.full(SHAPE, -0.5), "tok-7")


def test_an_error_beyond_the_limit_is_refused_with_the_way_out() -> None:
    value = torch.full(SHAPE, 0.6)
    value[:, 0, 0] = 100.0
    with pytest.raises(CacheError, match=r"'tok-7'.*allowed are 0\.001.*Set signals\.bev_low\.encoding: root8"):
        encode("bev_low", SignalSpec(encoding="uint8", max_error=0.001), value, "tok-7")


@pytest.mark.parametrize("value", [1e6, 1e-9])
def test_values_outside_of_half_precision_are_refused(value: float) -> None:
    with pytest.raises(CacheError, match=r"float16 with an error of .* Raise signals\.bev_low\.max_error or rescale"):
        encode("bev_low", SignalSpec(encoding="float16"), torch.full(SHAPE, value), "t")


def test_a_map_for_boxes_and_boxes_for_a_map_are_refused() -> None:
    with pytest.raises(CacheError, match="boxes of sample 't' is Tensor"):
        encode("boxes", SignalSpec(encoding="boxes"), torch.zeros(SHAPE), "t")
    with pytest.raises(CacheError, match="bev_low of sample 't' is Boxes"):
        encode("bev_low", SignalSpec(encoding="uint8"), Boxes.empty(), "t")


def test_boxes_come_back_exactly_with_unknown_velocities() -> None:
    given_boxes = boxes(3)
    given_boxes.values[1, 7:] = torch.nan
    spec = SignalSpec(encoding="boxes")
    restored = decoded("boxes", spec, encode("boxes", spec, given_boxes, "t"))
    assert torch.equal(restored.values.nan_to_num(-1), given_boxes.values.nan_to_num(-1))
    assert torch.equal(restored.labels, given_boxes.labels)
    assert torch.equal(restored.scores, given_boxes.scores)


def test_no_boxes_are_a_valid_sample() -> None:
    spec = SignalSpec(encoding="boxes")
    encoded = encode("boxes", spec, Boxes.empty(), "t")
    assert encoded.arrays["boxes_count"] == 0
    assert len(decoded("boxes", spec, encoded)) == 0


def test_over_capacity_keeps_the_highest_scores_in_their_order() -> None:
    spec = SignalSpec(encoding="boxes", capacity=3)
    restored = decoded("boxes", spec, encode("boxes", spec, boxes(5, [0.2, 0.9, 0.5, 0.1, 0.7]), "t"))
    assert restored.scores.tolist() == pytest.approx([0.9, 0.5, 0.7])


def test_boxes_under_the_lowest_score_are_dropped() -> None:
    spec = SignalSpec(encoding="boxes", min_score=0.3)
    assert len(decoded("boxes", spec, encode("boxes", spec, boxes(4, [0.2, 0.9, 0.3, 0.1]), "t"))) == 2


@pytest.mark.parametrize("column", [0, 3, 6])
def test_non_finite_boxes_are_refused(column: int) -> None:
    bad = boxes(3)
    bad.values[1, column] = torch.nan
    with pytest.raises(CacheError, match="boxes of sample 'tok-7': 1 rows hold non-finite values, the first is box 1"):
        encode("boxes", SignalSpec(encoding="boxes"), bad, "tok-7")


def test_an_infinite_velocity_is_refused() -> None:
    bad = boxes(3)
    bad.values[1, 7] = torch.inf
    with pytest.raises(CacheError, match="non-finite"):
        encode("boxes", SignalSpec(encoding="boxes"), bad, "t")


# ---------------------------------------------------------------------------------------------- root8 and logits


@quick
@given(maps(-(2.0**20), 2.0**20), st.integers(1, 127))
def test_root8_is_within_half_a_step_of_the_root_and_keeps_sign_and_zeros(value: Any, levels: int) -> None:
    spec = loose("root8").model_copy(update={"levels": levels})
    encoded = quantise("root8", value.reshape(3, -1), levels)
    restored = decoded("bev_high", spec, Encoded(arrays_of(encoded, value), 0, 0)).numpy()
    assert np.array_equal(np.sign(restored), np.sign(value))
    assert np.abs(encoded.levels.astype(int)).max() <= levels
    step = np.sqrt(encoded.scales)[:, None, None]
    lifted = np.abs(encoded.levels.reshape(value.shape)) == 1
    near = np.abs(np.sqrt(np.abs(restored)) - np.sqrt(np.abs(value))) <= step * 0.501
    assert (near | lifted).all()


def arrays_of(encoded: Quantised, value: Any) -> dict[str, Any]:
    return {"bev_high": encoded.levels.reshape(value.shape), "bev_high_scale": encoded.scales}


def test_root8_keeps_small_values_of_a_channel_with_a_high_peak() -> None:
    generator = np.random.default_rng(0)
    value = np.exp(generator.normal(0, 2, (4, 30, 30))).astype(np.float32)  # heavy tails, as teachers have
    assert value.max() / np.median(value) > 100
    small = value < np.median(value)
    errors = {}
    for name in ("uint8", "root8"):
        restored = decoded("bev_low", loose(name), encode("bev_low", loose(name), value, "t")).numpy()
        errors[name] = np.linalg.norm((restored - value)[small]) / np.linalg.norm(value[small])
    assert errors["root8"] < errors["uint8"] / 3


@quick
@given(maps(-60, 60))
def test_logits_keep_both_probabilities_that_losses_read(value: Any) -> None:
    spec = SignalSpec(encoding="logits", max_error=0.02)
    encoded = encode("heatmap", spec, value, "t")
    before, after = torch.from_numpy(value), decoded("heatmap", spec, encoded)
    worst = max(
        (before.sigmoid() - after.sigmoid()).abs().max(), ((before / 2).sigmoid() - (after / 2).sigmoid()).abs().max()
    )
    assert worst <= encoded.error + 1e-5 <= 0.0191


def test_logits_tell_small_probabilities_apart_which_logit8_does_not() -> None:
    value = torch.tensor([-16.0, -12.0, -9.0, -7.0, -3.0, 2.0]).view(1, 1, 6)
    new, old = (
        decoded("heatmap", spec, encode("heatmap", spec, value, "t")) for spec in (loose("logits"), loose("logit8"))
    )
    assert torch.allclose(new, value, atol=0.04)
    assert len(old[..., :4].unique()) == 1


def test_equal_logits_are_exact() -> None:
    value = torch.full(SHAPE, -2.19)
    assert torch.allclose(decoded("heatmap", loose("logits"), encode("heatmap", loose("logits"), value, "t")), value)


# ---------------------------------------------------------------------------------------------- sparse maps


@quick
@given(hnp.arrays(np.bool_, (4, 5)), st.integers(0, 100))
def test_sparse_keeps_known_cells_in_half_precision_and_says_which_they_are(known: Any, seed: int) -> None:
    value = torch.randn(2, 10, 4, 5, generator=torch.Generator().manual_seed(seed))
    spec = SignalSpec(encoding="sparse")
    encoded = encode("box_code", spec, SparseMap(value, torch.from_numpy(known)), "t")
    stored = {key: torch.from_numpy(array)[None] for key, array in encoded.arrays.items()}
    restored = decode("box_code", spec, stored)
    assert isinstance(restored, SparseMap)
    assert np.array_equal(restored.known[0].numpy(), known)
    assert torch.equal(restored.values[0], torch.where(restored.known[0], value.half().float(), torch.zeros(())))


def test_a_dense_map_for_sparse_is_refused() -> None:
    with pytest.raises(CacheError, match=r"box_code of sample 't' is Tensor, but .* stores SparseMap"):
        encode("box_code", SignalSpec(encoding="sparse"), torch.zeros(2, 10, 4, 5), "t")


# ---------------------------------------------------------------------------------------------- points


def points(count: int, seed: int = 0) -> BoxPoints:
    generator = torch.Generator().manual_seed(seed)
    return BoxPoints(torch.randn(count, 7, generator=generator), torch.randn(count, 9, 4, generator=generator))


@pytest.mark.parametrize(("name", "tolerance"), [("float16", 1e-3), ("root8", 0.02)])
@pytest.mark.parametrize("count", [0, 1, 5])
def test_points_come_back_with_the_boxes_they_belong_to(name: str, tolerance: float, count: int) -> None:
    spec = SignalSpec.model_validate({"encoding": name, "capacity": 6})
    given_points = points(count)
    restored = decoded("points_low", spec, encode("points_low", spec, given_points, "t"))
    assert torch.equal(restored.boxes, given_points.boxes)
    assert restored.values.shape == (count, 9, 4)
    assert float((restored.values - given_points.values).norm()) <= tolerance * float(given_points.values.norm() + 1e-9)


def test_more_points_than_the_capacity_are_refused_by_name() -> None:
    with pytest.raises(CacheError, match=r"points_low of sample 't' has 3 boxes, signals\.points_low\.capacity is 2"):
        encode("points_low", SignalSpec(encoding="root8", capacity=2), points(3), "t")


def test_a_batch_of_points_keeps_frames_apart() -> None:
    spec = SignalSpec(encoding="root8", capacity=4)
    encoded = [encode("points_high", spec, points(count, count), "t").arrays for count in (2, 0, 4)]
    batch = {key: torch.stack([torch.from_numpy(one[key]) for one in encoded]) for key in encoded[0]}
    restored = decode("points_high", spec, batch)
    assert isinstance(restored, tuple)
    assert [len(each) for each in restored] == [2, 0, 4]


def test_points_that_are_not_finite_are_refused() -> None:
    bad = points(2)
    bad.values[1, 3, 0] = torch.nan
    with pytest.raises(CacheError, match="points_low of sample 't' has 1 non-finite values"):
        encode("points_low", SignalSpec(encoding="root8"), bad, "t")


# ---------------------------------------------------------------------------------------------- instances


def disc(height: int, width: int) -> Any:
    rows, columns = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    return rows**2 + columns**2 <= 1


def instances(*sizes: tuple[int, int], scores: list[float] | None = None) -> Instances:
    n = len(sizes)
    boxes = torch.tensor([[10.5, 20, 10.5 + w, 20 + h] for h, w in sizes]).reshape(n, 4)
    return Instances(
        torch.arange(n) % 6, boxes, torch.arange(n), torch.tensor(scores or [0.9] * n), tuple(disc(*s) for s in sizes)
    )


def test_instances_come_back_with_masks_spread_over_their_boxes() -> None:
    spec = SignalSpec(encoding="masks", resolution=32, max_error=0.05)
    given_instances = instances((200, 90), (7, 5), (64, 400))
    encoded = encode("instances", spec, given_instances, "t")
    restored = decoded("instances", spec, encoded)
    for name in ("cameras", "boxes", "labels"):
        assert torch.equal(getattr(restored, name), getattr(given_instances, name))
    assert {tuple(mask.shape) for mask in restored.masks} == {(32, 32)}
    overlaps = [
        float((exact & back).sum() / (exact | back).sum())
        for exact, mask in zip(given_instances.masks, restored.masks, strict=True)
        for back in [spread(mask, *exact.shape)]
    ]
    assert encoded.error == pytest.approx(1 - sum(overlaps) / 3, abs=1e-6)
    assert min(overlaps) > 0.95


@quick
@given(hnp.arrays(np.bool_, st.tuples(st.integers(1, 8), st.integers(1, 8))))
def test_masks_not_larger_than_their_grid_are_exact(mask: Any) -> None:
    spec = SignalSpec(encoding="masks", resolution=64)
    given_instances = dataclasses.replace(instances(mask.shape), masks=(torch.from_numpy(mask),))
    (restored,) = decoded("instances", spec, encode("instances", spec, given_instances, "t")).masks
    assert np.array_equal(spread(restored, *mask.shape).numpy(), mask)


def test_masks_that_a_grid_cannot_hold_are_refused_with_the_way_out() -> None:
    noise = torch.rand(300, 300, generator=torch.Generator().manual_seed(0)) > 0.5
    hard = dataclasses.replace(instances((300, 300)), masks=(noise,))
    with pytest.raises(CacheError, match=r"Raise signals\.instances\.resolution or signals\.instances\.max_error"):
        encode("instances", SignalSpec(encoding="masks"), hard, "t")


def test_no_instances_are_a_valid_sample() -> None:
    spec = SignalSpec(encoding="masks")
    encoded = encode("instances", spec, Instances.empty(), "t")
    assert encoded.error == 0
    assert len(decoded("instances", spec, encoded)) == 0


def test_instances_over_capacity_keep_the_highest_scores() -> None:
    spec = SignalSpec(encoding="masks", capacity=2, max_error=0.1)
    many = instances((9, 9), (9, 9), (9, 9), scores=[0.5, 0.2, 0.9])
    assert decoded("instances", spec, encode("instances", spec, many, "t")).labels.tolist() == [0, 2]


def test_a_mask_without_pixels_is_refused() -> None:
    empty = dataclasses.replace(instances((4, 4)), masks=(torch.zeros(0, 4, dtype=torch.bool),))
    with pytest.raises(CacheError, match="the mask of instance 0 is"):
        encode("instances", SignalSpec(encoding="masks"), empty, "t")
