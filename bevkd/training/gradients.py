"""How strongly each term pulls at a model: the norms of their gradients, beside the training step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn


def shared_weights(model: nn.Module) -> list[nn.Parameter]:
    """Return the weights that are trained and that all terms share: all but the head's, if there are others.

    What only detection reaches would make its gradient look larger than it is where terms compete.
    """
    trained = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    shared = [weight for name, weight in trained if not name.startswith("head.")]
    return shared or [weight for _, weight in trained]


def gradient_norms(
    losses: Mapping[str, Tensor], weights: Sequence[nn.Parameter], scale: float = 1.0
) -> Float[Tensor, "n"]:
    """Return the norm of the gradient of each loss with respect to ``weights``, 0 where it has none.

    The graph stays, nothing is added to ``grad``, and hooks on it, as those of several processes, are not called.

    Args:
        scale: by which losses are multiplied on the way, so that gradients in half precision do not vanish.
    """
    norms = []
    for loss in losses.values():
        found = torch.autograd.grad(loss * scale, weights, retain_graph=True, allow_unused=True)
        present = [gradient.float().norm() for gradient in found if gradient is not None]
        norms.append(torch.stack(present).norm() / scale if present else loss.new_zeros((), dtype=torch.float32))
    return torch.stack(norms)
