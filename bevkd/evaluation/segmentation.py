"""Average precision of instance masks and boxes, as COCO defines it, computed by pycocotools.

AP is the mean over IoU thresholds 0.5, 0.55, ..., 0.95 of the area under the interpolated precision-recall curve (101
points); AP50 and AP75 are those of one threshold. At most 100 instances of a class count per image.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Bool
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor
from torch.utils.data import DataLoader

from bevkd.data.instances import ImageDataset, ImageSample, ImageSource, collate_images
from bevkd.geometry.masks import move_instances
from bevkd.models.detector import channels_last
from bevkd.models.segmenter import Segmenter
from bevkd.progress import Progress
from bevkd.types import Instances

if TYPE_CHECKING:
    from rich.table import Table

_THRESHOLDS = np.linspace(0.5, 0.95, 10)
_MOST = 100
_LARGEST_PX = 1e10


@dataclass(frozen=True)
class Precision:
    """AP over all thresholds, and at IoU 0.5 and 0.75; NaN where nothing is annotated."""

    ap: float
    ap50: float
    ap75: float


@dataclass(frozen=True)
class ClassPrecision:
    """Scores of one class.

    Attributes:
        objects: annotated ones that count.
    """

    mask: Precision
    box: Precision
    objects: int


@dataclass(frozen=True)
class SegmentationReport:
    """What the metrics say about instances; the means are over the classes that are annotated.

    Attributes:
        per_class: by class name.
        images: number of images.
        min_area_px: smaller objects, in visible pixels, do not count, and neither do instances found on them.
    """

    mask: Precision
    box: Precision
    per_class: Mapping[str, ClassPrecision]
    images: int
    min_area_px: int

    @property
    def headline(self) -> dict[str, float]:
        """The few numbers to show first."""
        return {"mask AP": self.mask.ap, "mask AP50": self.mask.ap50, "box AP": self.box.ap}

    def to_json(self) -> dict[str, Any]:
        """Return all numbers as JSON values; NaN becomes null."""
        values: dict[str, Any] = _without_nan(asdict(self))
        return values

    def table(self) -> Table:
        """Return the table by class, in percent."""
        from rich.box import SIMPLE_HEAD
        from rich.table import Table

        table = Table(
            title=f"mask AP {_percent(self.mask.ap)}   box AP {_percent(self.box.ap)}   {self.images} images",
            title_justify="left",
            caption=f"in percent, over objects of at least {self.min_area_px} visible pixels; AP over IoU 0.5 to 0.95",
            caption_justify="left",
            box=SIMPLE_HEAD,
            pad_edge=False,
        )
        table.add_column("class")
        for heading in ("objects", "mask AP", "AP50", "AP75", "box AP", "AP50", "AP75"):
            table.add_column(heading, justify="right")
        total = sum(each.objects for each in self.per_class.values())
        for name, score in {**self.per_class, "mean": ClassPrecision(self.mask, self.box, total)}.items():
            figures = [value for part in (score.mask, score.box) for value in (part.ap, part.ap50, part.ap75)]
            table.add_row(name, str(score.objects), *map(_percent, figures))
        return table


@torch.inference_mode()
def predict_instances(
    segmenter: Segmenter, source: ImageSource, progress: Progress, batch_size: int = 4, workers: int = 0
) -> dict[str, Instances]:
    """Return the instances in each image of ``source``, on the CPU, in pixels of the original images.

    The segmenter is used in eval mode.
    """
    device = next(segmenter.parameters()).device
    config = segmenter.config
    dataset = ImageDataset(source, source.tokens, config.image_height, config.image_width)
    loader: DataLoader[ImageSample] = DataLoader(
        dataset, batch_size=batch_size, num_workers=workers, collate_fn=collate_images
    )
    was_training = segmenter.training
    channels_last(segmenter)
    segmenter.eval()
    found: dict[str, Instances] = {}
    with progress.task("predicting", len(source.tokens), "image") as task:
        for batch in loader:
            instances = segmenter.head.decode(segmenter(batch.images.to(device))).to("cpu")
            originals = torch.linalg.inv(batch.view_from_original)
            for index, token in enumerate(batch.tokens):
                own = instances[instances.cameras == index]
                moved = move_instances(own, originals, source.size(token))
                found[token] = moved
            task.advance(len(batch))
    segmenter.train(was_training)
    return found


def evaluate_instances(source: ImageSource, found: Mapping[str, Instances]) -> SegmentationReport:
    """Return the scores of ``found`` against the annotations of every image of ``source``.

    Args:
        found: instances in pixels of the original image, by image token; at least one entry per image.
    """
    truth = {token: source.instances(token) for token in source.tokens}
    sizes = {token: source.size(token) for token in source.tokens}
    return score_instances(truth, found, sizes, source.classes, source.config.min_area_px)


def score_instances(
    truth: Mapping[str, Instances],
    found: Mapping[str, Instances],
    sizes: Mapping[str, tuple[int, int]],
    classes: Sequence[str],
    min_area_px: int = 1,
) -> SegmentationReport:
    """Return the scores of ``found`` against ``truth``, both by image, in pixels of images of ``sizes`` (H, W).

    Args:
        classes: names of the labels.
        min_area_px: smaller annotated objects are ignored: to find them is neither right nor wrong.
    """
    annotated = _dataset(truth, sizes, classes)
    detected = _dataset(found, sizes, classes)
    masks = _precision(annotated, detected, "segm", len(classes), min_area_px)
    boxes = _precision(annotated, detected, "bbox", len(classes), min_area_px)
    counts = [0] * len(classes)
    for row in annotated.dataset["annotations"]:
        counts[row["category_id"] - 1] += row["area"] >= min_area_px
    return SegmentationReport(
        mask=_mean(masks),
        box=_mean(boxes),
        per_class={
            name: ClassPrecision(*scores)
            for name, scores in zip(classes, zip(masks, boxes, counts, strict=True), strict=True)
        },
        images=len(sizes),
        min_area_px=min_area_px,
    )


def encode_mask(mask: Bool[Tensor, "h w"], box: Sequence[float], size: tuple[int, int]) -> dict[str, Any]:
    """Return COCO's run-length code of a mask over its box of whole pixels, in an image of ``size`` (H, W)."""
    left, top, right, bottom = (round(edge) for edge in box)
    whole = np.zeros(size, dtype=np.uint8, order="F")
    whole[top:bottom, left:right] = mask.numpy()
    code: dict[str, Any] = coco_mask.encode(whole)
    return code


def _dataset(instances: Mapping[str, Instances], sizes: Mapping[str, tuple[int, int]], classes: Sequence[str]) -> COCO:
    """Return instances as pycocotools holds them: truth and findings look alike, the latter have a score."""
    rows: list[dict[str, Any]] = []
    for image, (token, size) in enumerate(sizes.items(), start=1):
        own = instances[token]
        fields = zip(own.masks, own.boxes.tolist(), own.labels.tolist(), own.scores.tolist(), strict=True)
        for mask, box, label, score in fields:
            left, top, right, bottom = box
            rows.append(
                {
                    "id": len(rows) + 1,
                    "image_id": image,
                    "category_id": label + 1,
                    "segmentation": encode_mask(mask, box, size),
                    "bbox": [left, top, right - left, bottom - top],
                    "area": int(mask.sum()),
                    "score": score,
                    "iscrowd": 0,
                }
            )
    coco = COCO()
    coco.dataset = {
        "images": [
            {"id": image, "height": height, "width": width}
            for image, (height, width) in enumerate(sizes.values(), start=1)
        ],
        "annotations": rows,
        "categories": [{"id": number, "name": name} for number, name in enumerate(classes, start=1)],
    }
    _silently(coco.createIndex)
    return coco


def _precision(truth: COCO, found: COCO, kind: str, classes: int, min_area_px: int) -> list[Precision]:
    """Return the scores of each class."""
    evaluation = COCOeval(truth, found, kind)
    evaluation.params.iouThrs = _THRESHOLDS
    evaluation.params.maxDets = [_MOST]
    evaluation.params.areaRng = [[min_area_px, _LARGEST_PX]]
    evaluation.params.areaRngLbl = ["all"]
    _silently(evaluation.evaluate)
    _silently(evaluation.accumulate)
    # [thresholds, recalls, classes, areas, numbers of detections]; -1 where a class has no objects.
    curves: npt.NDArray[np.float64] = evaluation.eval["precision"][:, :, :, 0, 0]
    scores = []
    for number in range(classes):
        by_threshold = curves[:, :, number].mean(axis=1)
        known = by_threshold.min() >= 0
        figures = (by_threshold.mean(), by_threshold[0], by_threshold[5])
        scores.append(Precision(*(float(figure) if known else math.nan for figure in figures)))
    return scores


def _silently(work: Callable[[], object]) -> None:
    """Call what prints to stdout, which belongs to the user's results."""
    with contextlib.redirect_stdout(io.StringIO()):
        work()


def _mean(scores: Sequence[Precision]) -> Precision:
    known = [score for score in scores if not math.isnan(score.ap)]
    if not known:
        return Precision(math.nan, math.nan, math.nan)
    return Precision(*(sum(getattr(score, name) for score in known) / len(known) for name in ("ap", "ap50", "ap75")))


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(each) for key, each in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.1f}"
