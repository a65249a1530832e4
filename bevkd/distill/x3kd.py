"""X3KD (arXiv 2303.02203): distillation across modalities (X-OD, X-FD, X-AT) and tasks (X-IS).

The paper has no public code and states no weights: every constant is a setting, the defaults are ours.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from bevkd.data.collate import Batch
from bevkd.distill.base import DistillContext, DistillLoss, DistillLossConfig, TeacherBatch
from bevkd.errors import ContractError
from bevkd.geometry.masks import join_views
from bevkd.models.bev_encoder import conv_bn_relu
from bevkd.models.detector import DetectorOutput
from bevkd.models.heads.center import CenterHead, gather_codes, gaussian_focal_loss, quality_focal_loss
from bevkd.models.instance_head import InstanceHead, InstanceHeadConfig


class Config(DistillLossConfig):
    """Which terms of X3KD to use, and how strongly; zero switches a term off and drops its signals.

    Attributes:
        output: weight of X-OD.
        score: the teacher's boxes above it are targets.
        heatmap: ``gaussian`` draws the boxes and learns them by focal loss, ``quality`` learns the teacher's
            probabilities in all cells by quality focal loss, as CRKD (arXiv 2403.19104) does.
        box: weight of the box term beside the heatmap term.
        feature: weight of X-FD.
        feature_distance: of predicted and cached features.
        standardise: X-FD predicts the teacher's features at mean 0 and standard deviation 1 per channel, by the
            statistics of the cache over the cells that hold something.
        empty: weight of the cells where the teacher's sparse map is empty, beside 1 for the others.
        decoder_channels: width of the decoder that predicts the teacher's features.
        adversarial: weight of X-AT; the paper's remedy for unstable training is to keep it small.
        discriminator_channels: width of the network that tells the modalities apart.
        reversal: factor of the reversed gradient.
        ramp: batches over which ``reversal`` rises from 0 as in DANN (arXiv 1505.07818, section 5.2.2); 0 has none.
        instance: weight of X-IS.
        instance_score: instances of the segmentation teacher above it are targets.
        instance_head: the head on the student's image features, which is dropped after training.
    """

    weights: ClassVar[tuple[str, ...]] = ("output", "feature", "adversarial", "instance")
    negatives: ClassVar[tuple[str, ...]] = ("output",)
    name: Literal["x3kd"] = "x3kd"
    output: float = Field(default=1.0, ge=0)
    score: float = Field(default=0.3, ge=0, lt=1)
    heatmap: Literal["gaussian", "quality"] = "gaussian"
    box: float = Field(default=0.25, ge=0)
    feature: float = Field(default=0.0, ge=0)
    feature_distance: Literal["l1", "smooth_l1", "l2"] = "l1"
    standardise: bool = False
    empty: float = Field(default=0.0, ge=0)
    decoder_channels: int = Field(default=128, gt=0)
    adversarial: float = Field(default=0.0, ge=0)
    discriminator_channels: int = Field(default=64, gt=0)
    reversal: float = Field(default=1.0, ge=0)
    ramp: int = Field(default=0, ge=0)
    instance: float = Field(default=0.0, ge=0)
    instance_score: float = Field(default=0.2, ge=0, lt=1)
    instance_head: InstanceHeadConfig = InstanceHeadConfig()

    def signals(self) -> tuple[str, ...]:
        """Return the signals that the terms with a weight read."""
        needed = {
            "boxes": self.output > 0,
            "heatmap": self.output > 0 and self.heatmap == "quality",
            "bev_low": self.feature > 0,
            "bev_high": self.adversarial > 0,
            "instances": self.instance > 0,
        }
        return tuple(name for name, wanted in needed.items() if wanted)

    def misfits(self, context: DistillContext) -> list[str]:
        """Return why this student cannot learn from this teacher."""
        faults = []
        if self.output > 0 and not isinstance(context.student.head, CenterHead):
            faults.append(
                "X-OD turns teacher boxes into heatmaps: give the student the head 'center', or set output: 0"
            )
        if self.feature > 0:
            faults += context.finer_low("set feature: 0")
            faults += context.no_statistics("bev_low") if self.standardise else []
        if self.instance > 0:
            stride: int = getattr(context.student.encoder, "stride", 1)
            if not hasattr(context.student.encoder, "image_channels"):
                faults.append("X-IS learns from image features, which the student has none of: set instance: 0")
            elif stride % self.instance_head.fineness:
                faults.append(
                    f"instance_head.fineness is {self.instance_head.fineness}, which does not divide the stride "
                    f"{stride} of the student's image features: set another"
                )
        return faults


class OutputDistillation(nn.Module):
    """X-OD: the teacher's confident boxes as targets, on every frame, labelled or not.

    Focal loss on heatmaps drawn from the boxes, or on the teacher's own, plus a smooth-L1 loss on the box codes that
    weighs each box with the teacher's confidence.
    """

    def __init__(self, config: Config, head: CenterHead) -> None:
        super().__init__()
        self.config = config
        # In a tuple, so that the head's parameters do not become this module's.
        self._head = (head,)

    def forward(self, student: DetectorOutput, teacher: TeacherBatch) -> dict[str, Tensor]:
        """Return ``output_heatmap`` and ``output_box``, weighted."""
        head, config = self._head[0], self.config
        boxes = tuple(each[each.scores > config.score] for each in teacher.boxes)
        targets = head.targets(boxes, weights=[each.scores for each in boxes])
        heatmap = student.head.heatmap.new_zeros((), dtype=torch.float32)
        if config.heatmap == "quality":
            soft, covered = teacher.warped("heatmap")
            errors = torch.where(covered, quality_focal_loss(student.head.heatmap, soft.float().sigmoid()), 0.0)
            heatmap = errors.sum() / max(len(targets.cells), 1)
        else:
            for labels in head.labels_of_task:
                heatmap = heatmap + gaussian_focal_loss(student.head.heatmap[:, labels], targets.heatmap[:, labels])
        codes = gather_codes(student.head.box_code, targets.cells).float()
        known = ~targets.codes.isnan()
        error = nn.functional.smooth_l1_loss(codes, torch.where(known, targets.codes, codes.detach()), reduction="none")
        per_box = (error * codes.new_tensor(head.config.code_weights)).sum(dim=1)
        box = (per_box * targets.weights).sum() / targets.weights.sum().clamp(min=1e-6)
        return {"output_heatmap": config.output * heatmap, "output_box": config.output * config.box * box}


class FeatureDistillation(nn.Module):
    """X-FD: a small decoder predicts the teacher's sparse features from the student's; it is not part of the student.

    Args:
        own, theirs: channels of ``bev_low`` of student and teacher.
        standardise: of the teacher's features; None leaves them as they are.
    """

    def __init__(self, config: Config, own: int, theirs: int, standardise: nn.Module | None = None) -> None:
        super().__init__()
        self.config, width = config, config.decoder_channels
        self.standardise = standardise or nn.Identity()
        self.decoder = nn.Sequential(
            *conv_bn_relu(own, width, 3), *conv_bn_relu(width, width, 3), nn.Conv2d(width, theirs, 1)
        )

    def forward(self, student: DetectorOutput, teacher: TeacherBatch) -> dict[str, Tensor]:
        """Return ``feature``, weighted."""
        target, covered = teacher.warped("bev_low")
        predicted = self.decoder(student.bev_low.float())
        target, config = target.float(), self.config
        # Which cells hold something is for the features themselves to say.
        occupied = (target != 0).any(dim=1, keepdim=True)
        loss = sparse_distance(
            predicted, self.standardise(target), covered, config.feature_distance, config.empty, occupied
        )
        return {"feature": self.config.feature * loss}


def sparse_distance(
    predicted: Float[Tensor, "B C Y X"],
    target: Float[Tensor, "B C Y X"],
    covered: Bool[Tensor, "B 1 Y X"],
    distance: Literal["l1", "smooth_l1", "l2"],
    empty: float = 0.0,
    occupied: Bool[Tensor, "B 1 Y X"] | None = None,
) -> Float[Tensor, ""]:
    """Return the mean distance to a sparse map over its occupied cells and, with weight ``empty``, the others.

    Args:
        covered: cells where the target means something at all.
        occupied: None is where it is not zero.
    """
    functions = {"l1": functional.l1_loss, "smooth_l1": functional.smooth_l1_loss, "l2": functional.mse_loss}
    occupied = (target != 0).any(dim=1, keepdim=True) if occupied is None else occupied
    weights = torch.where(occupied, 1.0, empty) * covered
    error = functions[distance](predicted, torch.where(covered, target, 0.0), reduction="none")
    return (error.mean(dim=1, keepdim=True) * weights).sum() / weights.sum().clamp(min=1e-6)


class _Reversal(torch.autograd.Function):
    """The identity whose gradient is turned round (arXiv 1409.7495, equations 15 and 16)."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, factor: float) -> Tensor:
        """Return ``values``."""
        ctx.factor = factor
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """Return the gradient times ``-factor``."""
        return -ctx.factor * gradients[0], None


def reverse_gradient(values: Tensor, factor: float) -> Tensor:
    """Return ``values``; their gradient arrives multiplied by ``-factor``."""
    reversed_: Tensor = _Reversal.apply(values, factor)  # type: ignore[no-untyped-call]
    return reversed_


class AdversarialTraining(nn.Module):
    """X-AT: a network learns to tell the student's features from the teacher's, and the student to mislead it.

    It judges cell by cell. Without normalisation, which would tell it whose batch it sees.

    Args:
        own, theirs: channels of ``bev_high`` of student and teacher; if they differ, the student's are brought to the
            teacher's by a convolution that is part of the judge.
    """

    batches: Tensor

    def __init__(self, config: Config, own: int, theirs: int) -> None:
        super().__init__()
        self.config, width = config, config.discriminator_channels
        self.stem = nn.Identity() if own == theirs else nn.Conv2d(own, theirs, 1)
        self.judge = nn.Sequential(
            # Neighbours are looked at once the channels are few: a tenth of the work.
            nn.Conv2d(theirs, width, 1),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(width, width, 3, padding=1),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(width, 1, 1),
        )
        # In checkpoints, so that a resumed run goes on with the same factor.
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))
        self._seen: int | None = None

    def forward(self, student: DetectorOutput, teacher: TeacherBatch) -> dict[str, Tensor]:
        """Return ``adversarial``, weighted."""
        target, covered = teacher.warped("bev_high")
        own = self.stem(reverse_gradient(student.bev_high.float(), self._factor()))
        # The judge sees neighbours: what the teacher does not cover must look the same on both sides.
        own, theirs = (torch.where(covered, maps, 0.0) for maps in (own, target.float()))
        judged = self.judge(own), self.judge(theirs)
        return {"adversarial": self.config.adversarial * adversarial_loss(*judged, covered)}

    def _factor(self) -> float:
        """Return the factor of the reversed gradient for this batch, and count it."""
        config = self.config
        if self._seen is None:
            self._seen = int(self.batches)  # asked once: it lies on the device
        done, self._seen = self._seen, self._seen + self.training
        self.batches.fill_(self._seen)
        if config.ramp == 0:
            return config.reversal
        return config.reversal * (2 / (1 + math.exp(-10 * min(done / config.ramp, 1.0))) - 1)


def adversarial_loss(
    student: Float[Tensor, "B 1 Y X"], teacher: Float[Tensor, "B 1 Y X"], covered: Bool[Tensor, "B 1 Y X"]
) -> Float[Tensor, ""]:
    """Return the binary cross entropies of both judgements, meaned over the cells that the teacher covers.

    Args:
        student, teacher: logits of being the teacher's.
    """
    both = functional.softplus(student) + functional.softplus(-teacher)
    return torch.where(covered, both, 0.0).sum() / covered.sum().clamp(min=1)


class InstanceSegmentation(nn.Module):
    """X-IS: a head on the student's image features learns the masks of a segmentation teacher.

    It reaches the backbone without the detour of the lift to BEV. The paper's head has two stages; ours is the
    segmenter's, of a single stage, whose losses stand for those of proposals, boxes and masks.
    """

    def __init__(self, config: Config, channels: int, stride: int, classes: int) -> None:
        super().__init__()
        self.config = config
        self.head = InstanceHead(config.instance_head, channels, stride, classes)

    def forward(self, student: DetectorOutput, teacher: TeacherBatch) -> dict[str, Tensor]:
        """Return ``instance_heatmap``, ``instance_box`` and ``instance_mask``, weighted."""
        features, frames = student.image_features, teacher.instances
        if features is None or frames is None:
            raise ContractError("X-IS needs image features of the student and instances in its views, in one batch.")
        height, width = (side * self.head.stride for side in features.shape[-2:])
        images = features.shape[0] * features.shape[1]
        seen = join_views(frames, features.shape[1], self.config.instance_score)
        losses = self.head.loss(
            self.head(features.flatten(0, 1).float()), self.head.targets(seen, images, height, width)
        )
        return {f"instance_{name}": self.config.instance * value for name, value in losses.items()}


class X3KD(nn.Module):
    """The terms that have a weight."""

    def __init__(self, config: Config, context: DistillContext) -> None:
        super().__init__()
        parts: dict[str, nn.Module] = {}
        if config.output > 0:
            parts["output"] = OutputDistillation(config, context.student.head)
        if config.feature > 0:
            channels = context.channels("bev_low"), context.teacher_channels("bev_low")
            standardise = context.standardise("bev_low") if config.standardise else None
            parts["feature"] = FeatureDistillation(config, *channels, standardise)
        if config.adversarial > 0:
            channels = context.channels("bev_high"), context.teacher_channels("bev_high")
            parts["adversarial"] = AdversarialTraining(config, *channels)
        if config.instance > 0:
            encoder, classes = context.student.encoder, len(context.student.classes)
            parts["instance"] = InstanceSegmentation(config, encoder.image_channels, encoder.stride, classes)
        self.parts = nn.ModuleDict(parts)

    def forward(self, student: DetectorOutput, teacher: TeacherBatch, batch: Batch) -> dict[str, Tensor]:
        """Return the weighted terms by name."""
        del batch
        terms: dict[str, Tensor] = {}
        for part in self.parts.values():
            terms |= part(student, teacher)
        return terms


def build(config: Config, context: DistillContext) -> DistillLoss:
    """Return the loss for a student and a cache."""
    return X3KD(config, context)
