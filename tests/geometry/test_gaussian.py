from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bevkd.geometry.gaussian import draw_gaussians, gaussian_radius


@pytest.mark.parametrize(
    ("length_m", "width_m", "cell_m", "radii"),
    [
        (4.6, 1.95, 0.6, (2.096081, 1.938292, 1.264796)),
        (10.0, 2.9, 0.6, (3.648491, 3.254216, 2.101360)),
        (0.7, 0.66, 0.6, (0.489837, 0.469095, 0.309517)),
        (4.6, 1.95, 0.8, (1.572061, 1.453719, 0.948597)),
    ],
)
def test_radius_equals_the_published_values(
    length_m: float, width_m: float, cell_m: float, radii: tuple[float, ...]
) -> None:
    length, width = torch.tensor([length_m / cell_m]), torch.tensor([width_m / cell_m])
    ours = [gaussian_radius(length, width, overlap).item() for overlap in (0.1, 0.5, 0.7)]
    assert ours == pytest.approx(radii, rel=1e-5)


def draw_one(shape: tuple[int, int, int], channel: int, row: int, column: int, radius: int) -> torch.Tensor:
    """Draw one Gaussian cell by cell."""
    drawn = torch.zeros(shape)
    sigma = (2 * radius + 1) / 6
    for i in range(max(row - radius, 0), min(row + radius + 1, shape[1])):
        for j in range(max(column - radius, 0), min(column + radius + 1, shape[2])):
            drawn[channel, i, j] = torch.exp(torch.tensor(-((i - row) ** 2 + (j - column) ** 2) / (2 * sigma**2)))
    return drawn


gaussians = st.lists(
    st.tuples(st.integers(0, 1), st.integers(-3, 11), st.integers(-3, 14), st.integers(0, 5)), max_size=6
)


@given(gaussians)
def test_many_gaussians_are_the_maximum_of_each_drawn_alone(drawn: list[tuple[int, int, int, int]]) -> None:
    shape = (2, 9, 12)
    table = torch.tensor(drawn, dtype=torch.int64).reshape(-1, 4)
    expected = torch.stack([torch.zeros(shape), *(draw_one(shape, *one) for one in drawn)]).amax(0)
    torch.testing.assert_close(draw_gaussians(shape, table[:, 0], table[:, 1:3], table[:, 3]), expected)


def test_the_peak_is_exactly_one() -> None:
    drawn = draw_gaussians((1, 9, 9), torch.tensor([0]), torch.tensor([[4, 5]]), torch.tensor([3]))
    assert (drawn == 1).nonzero().tolist() == [[0, 4, 5]]


def test_a_large_gaussian_does_not_widen_a_small_one() -> None:
    drawn = draw_gaussians((2, 20, 20), torch.tensor([0, 1]), torch.tensor([[9, 9], [9, 9]]), torch.tensor([1, 6]))
    assert (drawn > 0).flatten(1).sum(1).tolist() == [9, 169]
