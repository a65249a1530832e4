"""Telling whether sensor files are whole: what all sources share."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image, UnidentifiedImageError


def file_faults(root: Path, files: list[str], fault: Callable[[Path], str | None]) -> dict[str, str]:
    """Return the fault of each of ``files`` (relative to ``root``) that has one."""
    # Threads hide the latency of network file systems; checking needs almost no processor time.
    with ThreadPoolExecutor(max_workers=8) as pool:
        faults = pool.map(fault, [root / name for name in files])
        return {name: text for name, text in zip(files, faults, strict=True) if text}


def skipped_notes(skipped: int, frames: int, split: str) -> tuple[str, ...]:
    """Return what to tell users about frames left out for their sensor files; nothing if none was."""
    return (f"{skipped} of {frames} frames of {split} left out: sensor files missing or damaged",) if skipped else ()


def file_fault(path: Path, lidar_record_bytes: int) -> str | None:
    """Return what is wrong with a LiDAR scan or an image: missing, empty or truncated; None if it looks whole.

    Cheap: an image is not decoded. A truncated JPEG lacks its end marker, which cannot occur inside its data.

    Args:
        lidar_record_bytes: size of one return in a ``.bin`` file.
    """
    try:
        size = path.stat().st_size
        if not path.is_file():
            return "is not a file"
        if size == 0:
            return "is empty"
        if path.name.endswith(".bin"):
            return _lidar_fault(size, lidar_record_bytes)
        return _image_fault(path, size)
    except FileNotFoundError:
        return "missing"
    except (OSError, ValueError) as error:
        return f"cannot be read ({error})"


def _lidar_fault(size: int, record_bytes: int) -> str | None:
    if size % record_bytes:
        return f"truncated ({size} bytes is no multiple of the {record_bytes} bytes of a LiDAR return)"
    return None


def _image_fault(path: Path, size: int) -> str | None:
    with path.open("rb") as file:
        jpeg = file.read(2) == b"\xff\xd8"
        file.seek(max(0, size - 256))  # some cameras pad the end
        tail = file.read()
    if path.suffix.lower() in (".jpg", ".jpeg") and not jpeg:
        return "is not a JPEG image"
    if jpeg and b"\xff\xd9" not in tail:
        return "truncated (the JPEG end marker is missing)"
    try:
        with Image.open(path) as image:
            image.verify()
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        return f"is no whole image ({error})"
    return None
