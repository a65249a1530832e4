"""The terms of distillation losses, by what switches them: a loss by its label in the log, and one of its weights."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from bevkd.distill.base import DistillLossConfig, loss_labels


@dataclass(frozen=True, order=True)
class Term:
    """What one weight of one loss switches.

    Attributes:
        loss: label of the loss in the log.
        weight: field of the loss's config; empty for a loss without such fields, which is one term as a whole.
    """

    loss: str
    weight: str

    def __str__(self) -> str:
        return f"{self.loss}.{self.weight}" if self.weight else self.loss


def all_terms(losses: Sequence[DistillLossConfig]) -> tuple[Term, ...]:
    """Return every term of the losses, in their order, switched on or not."""
    return tuple(
        Term(label, weight)
        for label, loss in zip(loss_labels(losses), losses, strict=True)
        for weight in loss.weights or ("",)
    )


def active_terms(losses: Sequence[DistillLossConfig]) -> tuple[Term, ...]:
    """Return the terms whose weight is above 0."""
    by_label = dict(zip(loss_labels(losses), losses, strict=True))
    return tuple(term for term in all_terms(losses) if not term.weight or getattr(by_label[term.loss], term.weight) > 0)


def with_terms(losses: Sequence[DistillLossConfig], terms: Collection[Term]) -> tuple[DistillLossConfig, ...]:
    """Return the losses with all but ``terms`` switched off; a loss without any is left out."""
    kept = []
    for label, loss in zip(loss_labels(losses), losses, strict=True):
        own = {term.weight for term in terms if term.loss == label}
        off = dict.fromkeys((weight for weight in loss.weights if weight not in own), 0.0)
        if own:
            kept.append(type(loss).model_validate({**loss.model_dump(), **off}))
    return tuple(kept)


def terms_text(losses: Sequence[DistillLossConfig], terms: Collection[Term]) -> str:
    """Return a short name of a selection of terms: ``unidistill``, if all of its terms are in, ``x3kd.output+feature``.

    Args:
        losses: those that the terms are of, which say how many each has.
    """
    parts = []
    for label, loss in zip(loss_labels(losses), losses, strict=True):
        own = [weight for weight in loss.weights or ("",) if Term(label, weight) in terms]
        if len(own) == len(loss.weights or ("",)):
            parts.append(label)
        elif own:
            parts.append(f"{label}.{'+'.join(own)}")
    return " + ".join(parts)
