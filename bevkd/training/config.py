"""Settings of a training run."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from bevkd.config import StrictModel


class BalanceConfig(StrictModel):
    """Holds each term of distillation near the detection loss: a factor on it moves slowly, by medians of recent steps.

    Attributes:
        least, most: bounds of a term, as factors on the detection loss. ``least: 0`` never raises a term.
    """

    least: float = Field(default=0.1, ge=0)
    most: float = Field(default=1.0, gt=0)

    @model_validator(mode="after")
    def _check(self) -> BalanceConfig:
        if self.least > self.most:
            raise ValueError(f"least: {self.least:g} is above most: {self.most:g}")
        return self


class TrainingConfig(StrictModel):
    """How long, how fast and how often.

    Attributes:
        steps: optimizer steps of the run.
        batch_size: frames per process and forward pass.
        accumulation: forward passes per optimizer step.
        learning_rate: the schedule's peak, at the effective batch size as it is; nothing is scaled behind the scenes.
        schedule: ``one_cycle`` (up over ``warmup``, cosine down), ``cosine`` (the same from full rate after a linear
            ``warmup``), ``step`` (a tenth after each of ``milestones``), ``constant``; the last two after a linear
            ``warmup`` too.
        warmup, milestones: shares of the steps.
        clip: largest gradient norm; larger ones are scaled down to it.
        ema: decay of the exponential moving average of the weights that evaluation uses; None switches it off.
        frozen: parts that keep their weights and batch norm statistics, by the prefix of their parameters' names, e.g.
            ``encoder.backbone``.
        learning_rates: factor on the learning rate of parts, by prefix; the longest one counts.
        sync_batch_norm: batch norms look at the frames of all processes instead of one's own.
        precision: of accelerate's mixed precision.
        gradient_checkpointing: the image backbone computes its inner maps again for gradients, to save memory.
        compile: torch.compile of the BEV encoder and the head.
        deterministic: only operations that repeat bit by bit; on a GPU, where others are faster; CPU runs always
            do.
        labelled_share: share of labelled frames among those drawn when unlabelled ones take part; None draws all frames
            alike.
        balanced: repeat labelled frames so that every class has an equal share (CBGS, arXiv 1908.09492).
        workers: loader processes; 0 loads in the training process.
        threads: CPU threads of the training process; None leaves it to torch. Runs are repeatable bit by bit for one
            count of threads.
        evaluate_every: steps between evaluations, after each of which the best weights so far are kept; 0 evaluates at
            the end only.
        gradient_norms: steps between measurements of the gradients of detection and of each distillation term, for the
            log: each takes a backward pass per term; 0 measures none.
        diverged: stop if the loss stays above this factor times its median of the last 100 steps for 20 steps; None
            never does. A loss that is not finite always stops.
        checkpoint_every: steps between checkpoints; 0 keeps only the last.
        keep: newest checkpoints that stay.
    """

    steps: int = Field(gt=0)
    batch_size: int = Field(4, gt=0)
    accumulation: int = Field(1, gt=0)
    learning_rate: float = Field(2e-4, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    schedule: Literal["one_cycle", "cosine", "step", "constant"] = "one_cycle"
    warmup: float = Field(0.3, ge=0, lt=1)
    milestones: tuple[float, ...] = ()
    clip: float = Field(35.0, gt=0)
    ema: float | None = Field(None, gt=0, lt=1)
    frozen: tuple[str, ...] = ()
    learning_rates: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    sync_batch_norm: bool = False
    precision: Literal["no", "fp16", "bf16"] = "no"
    gradient_checkpointing: bool = False
    compile: bool = False
    deterministic: bool = False
    labelled_share: float | None = Field(None, ge=0, le=1)
    balanced: bool = False
    seed: int = Field(0, ge=0)
    workers: int = Field(2, ge=0)
    threads: int | None = Field(None, gt=0)
    log_every: int = Field(10, gt=0)
    evaluate_every: int = Field(0, ge=0)
    gradient_norms: int = Field(default=0, ge=0)
    diverged: float | None = Field(10.0, gt=1)
    checkpoint_every: int = Field(500, ge=0)
    keep: int = Field(2, gt=0)

    @model_validator(mode="after")
    def _check(self) -> TrainingConfig:
        if self.compile and self.gradient_norms:
            raise ValueError(
                "gradient_norms goes through the backward pass several times, which compiled parts do not allow: set "
                "compile: false or gradient_norms: 0"
            )
        return self

    @field_validator("precision", mode="before")
    @classmethod
    def _read_no(cls, value: object) -> object:
        """Return what a bare ``no`` means, which YAML reads as false."""
        return "no" if value is False else value
