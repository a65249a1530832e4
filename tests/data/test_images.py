"""A view shows the part of the image that its matrix says, whatever way it was decoded."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from bevkd.data.images import ImageView, read_image
from bevkd.errors import DataError

HEIGHT, WIDTH = 180, 320


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with one image as PNG and JPEG: red grows with x, green with y."""
    place = tmp_path_factory.mktemp("images")
    u, v = np.meshgrid(np.arange(WIDTH) + 0.5, np.arange(HEIGHT) + 0.5)
    pixels = np.stack([40 + u / WIDTH * 200, 40 + v / HEIGHT * 200, np.full_like(u, 128)], axis=-1).round()
    image = Image.fromarray(pixels.astype(np.uint8))
    image.save(place / "image.png")
    image.save(place / "image.jpg", quality=98, subsampling=0)
    return place


def expected(view: ImageView) -> tuple[np.ndarray, np.ndarray]:
    """Return red and green of the view by its matrix, and where the view lies well inside the image."""
    x, y = np.meshgrid(np.arange(view.width) + 0.5, np.arange(view.height) + 0.5)
    original_from_view = np.linalg.inv(view.matrix().double().numpy())
    u, v, _ = np.einsum("ij,jyx->iyx", original_from_view, np.stack([x, y, np.ones_like(x)]))
    margin = 1.5 / min(view.scale, 1.0)
    inside = (u > margin) & (u < WIDTH - margin) & (v > margin) & (v < HEIGHT - margin)
    return np.stack([40 + u / WIDTH * 200, 40 + v / HEIGHT * 200]), inside


@settings(max_examples=40, deadline=None)
@given(
    scale=st.floats(0.1, 2.0),
    left=st.integers(-60, 120),
    top=st.integers(-60, 120),
    flip=st.booleans(),
    rotation_rad=st.one_of(st.just(0.0), st.floats(-4, 4)),
    suffix=st.sampled_from(["png", "jpg"]),
)
def test_pixels_lie_where_the_matrix_puts_them(
    folder: Path, scale: float, left: int, top: int, flip: bool, rotation_rad: float, suffix: str
) -> None:
    view = ImageView(90, 110, scale, left, top, flip, rotation_rad)
    pixels = read_image(folder / f"image.{suffix}", view)
    assert pixels.shape == (3, 90, 110)
    assert pixels.dtype == torch.uint8
    wanted, inside = expected(view)
    np.testing.assert_allclose(pixels[:2].numpy()[:, inside], wanted[:, inside], atol=4)


def test_pixels_outside_the_image_are_black(folder: Path) -> None:
    pixels = read_image(folder / "image.png", ImageView(200, 400, 1.0, left=-30, top=-10))
    shown = (pixels[2] > 0).numpy()
    assert shown[10:190, 30:350].all()
    assert shown.sum() == HEIGHT * WIDTH
    assert not read_image(folder / "image.png", ImageView(20, 20, 1.0, left=5000)).any()


def test_a_covering_view_has_no_black_border(folder: Path) -> None:
    for height, width in ((64, 176), (100, 123), (97, 320), (180, 320)):
        view = ImageView.cover((HEIGHT, WIDTH), height, width)
        assert (read_image(folder / "image.jpg", view)[2] > 0).all()


def test_a_view_at_full_scale_is_a_plain_crop(folder: Path) -> None:
    whole = read_image(folder / "image.jpg")
    assert whole.shape == (3, HEIGHT, WIDTH)
    assert torch.equal(read_image(folder / "image.jpg", ImageView(50, 60, 1.0, left=7, top=9)), whole[:, 9:59, 7:67])


def test_a_flip_mirrors_the_crop(folder: Path) -> None:
    plain, mirrored = (
        read_image(folder / "image.jpg", ImageView(64, 100, 0.5, left=20, top=10, flip=flip)) for flip in (False, True)
    )
    assert torch.equal(mirrored, plain.flip(2))


def test_a_turn_is_counter_clockwise_about_the_centre_of_the_view() -> None:
    view = ImageView(60, 100, 0.5, left=10, top=20, rotation_rad=math.pi / 2)
    upright = replace(view, rotation_rad=0.0).matrix()
    centre, right_of_it = torch.tensor([[50.0, 60.0], [30.0, 30.0], [1.0, 1.0]]).T
    turned = view.matrix() @ torch.linalg.inv(upright)
    torch.testing.assert_close(turned @ centre, centre)
    torch.testing.assert_close(turned @ right_of_it, torch.tensor([50.0, 20.0, 1.0]))


def test_pixels_that_a_turn_brings_in_from_outside_are_black(folder: Path) -> None:
    view = ImageView(HEIGHT, WIDTH, 1.0, rotation_rad=0.2)
    shown = read_image(folder / "image.png", view)[2].numpy() > 0
    x, y = np.meshgrid(np.arange(WIDTH) + 0.5, np.arange(HEIGHT) + 0.5)
    u, v, _ = np.einsum("ij,jyx->iyx", np.linalg.inv(view.matrix().double().numpy()), np.stack([x, y, np.ones_like(x)]))
    distance = np.minimum(np.minimum(u, WIDTH - u), np.minimum(v, HEIGHT - v))
    assert shown[distance > 0.1].all()
    assert not shown[distance < -0.1].any()


@pytest.mark.parametrize("rotation_rad", [0.0, 0.1])
def test_fine_patterns_become_grey_rather_than_another_pattern(tmp_path: Path, rotation_rad: float) -> None:
    stripes = np.zeros((120, 120, 3), dtype=np.uint8)
    stripes[:, ::2] = 254
    Image.fromarray(stripes).save(tmp_path / "stripes.png")
    seen = read_image(tmp_path / "stripes.png", ImageView(30, 30, 0.5, left=15, top=15, rotation_rad=rotation_rad))
    assert (seen.float() - 127).abs().max() < 40  # single samples would reach from 0 to 254


def test_grey_images_become_rgb(tmp_path: Path) -> None:
    Image.new("L", (8, 6), 77).save(tmp_path / "grey.png")
    assert read_image(tmp_path / "grey.png").unique().tolist() == [77]


def test_faults_name_the_file(folder: Path, tmp_path: Path) -> None:
    whole = (folder / "image.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.jpg").write_text("no image")
    with pytest.raises(DataError, match=r"cut\.jpg cannot be decoded"):
        read_image(tmp_path / "cut.jpg", ImageView(64, 100, 0.5))
    with pytest.raises(DataError, match=r"text\.jpg cannot be decoded"):
        read_image(tmp_path / "text.jpg")
    with pytest.raises(DataError, match=r"no such image: .*absent\.jpg"):
        read_image(tmp_path / "absent.jpg")
    with pytest.raises(DataError, match="is 320 x 180 pixels, its table says 1600 x 900"):
        read_image(folder / "image.jpg", size=(900, 1600))
