"""Saving pictures, and what importing the package costs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bevkd.errors import ConfigError
from bevkd.viz import save
from bevkd.viz.image import new_figure, render, stack, text_at
from bevkd.viz.style import ROLE_COLORS, rgb
from tests.viz.pictures import where


def noise(width: int = 300, height: int = 200) -> Image.Image:
    """Return the worst case of a PNG: no two neighbours alike."""
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def test_a_picture_that_fits_is_saved_exactly(tmp_path: Path) -> None:
    path = save(noise(), tmp_path / "deep" / "picture.png")
    with Image.open(path) as saved:
        assert np.array_equal(np.asarray(saved), np.asarray(noise()))


def test_a_figure_is_saved_with_its_own_size(tmp_path: Path) -> None:
    figure = new_figure(321, 123)
    text_at(figure, 10, 10, "text")
    with Image.open(save(figure, tmp_path / "figure.png")) as saved:
        assert saved.size == (321, 123)
    assert render(figure).size == (321, 123)


@pytest.mark.parametrize("max_bytes", [100_000, 30_000, 2_000])
def test_no_file_is_larger_than_asked(tmp_path: Path, max_bytes: int) -> None:
    path = save(noise(), tmp_path / "picture.png", max_bytes)
    assert path.stat().st_size <= max_bytes


def test_fewer_colours_keep_those_of_the_roles(tmp_path: Path) -> None:
    image = noise()
    for index, color in enumerate(ROLE_COLORS.values()):
        image.paste(rgb(color), (20 + 60 * index, 20, 60 + 60 * index, 60))
    path = save(image, tmp_path / "picture.png", 120_000)
    assert path.stat().st_size < 120_000
    with Image.open(path) as saved:
        assert saved.size == image.size
        assert all(len(where(saved, color, 0)) > 1200 for color in ROLE_COLORS.values())


def test_a_failed_write_leaves_the_old_picture_and_no_debris(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(noise(), tmp_path / "picture.png")
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        save(noise(50, 50), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_other_formats_are_refused_with_the_name_to_use(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"does not end in .png. Rename it to 'picture.png'"):
        save(noise(), tmp_path / "picture.jpg")


def test_stacked_pictures_stand_below_each_other() -> None:
    red, blue = (Image.new("RGB", size, color) for size, color in (((40, 10), "#FF0000"), ((20, 30), "#0000FF")))
    page = stack([red, blue], gap_px=5, margin_px=2)
    assert page.size == (44, 49)
    assert page.getpixel((2, 2)) == (255, 0, 0)
    assert page.getpixel((2, 17)) == (0, 0, 255)
    assert page.getpixel((30, 17)) == (255, 255, 255)


def test_importing_the_package_loads_no_matplotlib_and_using_it_no_pyplot() -> None:
    script = """
import sys
import bevkd.viz
assert "matplotlib" not in sys.modules and "torch" not in sys.modules
assert {name for name in bevkd.viz.__all__ if not hasattr(bevkd.viz, name)} == set()
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-W", "error", "-c", script], check=True)


def test_unknown_names_are_missing_as_usual() -> None:
    import bevkd.viz

    with pytest.raises(AttributeError, match="no attribute 'draw_horses'"):
        _ = bevkd.viz.draw_horses
