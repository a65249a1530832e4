"""Which data set a cache is of. Imports nothing heavy."""

from __future__ import annotations

from bevkd.config import StrictModel


class DatasetIdentity(StrictModel):
    """Which frames these are; stands in every cache manifest.

    Attributes:
        split, frames: what was asked of it, and how many frames that is.
        annotation_digest: SHA-256 over all annotations of the version, so that a re-labelled data set is noticed.
    """

    name: str
    version: str
    split: str
    frames: int
    annotation_digest: str
