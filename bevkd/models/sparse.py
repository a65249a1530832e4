"""Sparse convolutions: the only module that imports spconv.

spconv's default algorithms need a GPU; its native one runs anywhere, forward and backward. Convolutions carry no
bias: on the CPU spconv refuses one in eval mode, and a batch norm follows each of them anyway.
"""

from __future__ import annotations

import logging
import warnings
from functools import cache
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from bevkd.errors import BevkdError

_BN_EPS, _BN_MOMENTUM = 1e-3, 0.01


@cache
def load_spconv() -> Any:
    """Return spconv's torch interface.

    Raises:
        BevkdError: it is not installed.
    """
    # Its wheels predate names that torch has deprecated since; nothing a user could act on.
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            import spconv.pytorch as spconv
        except ImportError as error:
            raise BevkdError(
                "LiDAR encoders need spconv, which cannot be imported here. Install the extra: "
                "pip install 'bevkd[teacher]' (a machine that only trains camera students does not need it)."
            ) from error
    return spconv


def _prepared(conv: nn.Module) -> nn.Module:
    """Return a convolution with its weights drawn for ReLU, which follows the device of its input."""
    weight = conv.get_parameter("weight")
    nn.init.normal_(weight, std=(2 / weight[0].numel()) ** 0.5)
    conv.register_forward_pre_hook(_follow_device)
    return conv


def _follow_device(module: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Forward pre-hook: choose spconv's algorithm for the device that the features are on."""
    from spconv.core import ConvAlgo

    module.algo = ConvAlgo.MaskImplicitGemm if inputs[0].features.is_cuda else ConvAlgo.Native


def sub_m_conv(in_channels: int, out_channels: int, key: str) -> nn.Module:
    """Return a 3x3x3 submanifold convolution: it keeps the set of occupied voxels."""
    conv: nn.Module = load_spconv().SubMConv3d(in_channels, out_channels, 3, padding=1, bias=False, indice_key=key)
    return _prepared(conv)


def down_conv(
    in_channels: int,
    out_channels: int,
    key: str,
    kernel: tuple[int, int, int] = (3, 3, 3),
    stride: tuple[int, int, int] = (2, 2, 2),
    padding: tuple[int, int, int] = (1, 1, 1),
) -> nn.Module:
    """Return a strided sparse convolution with batch norm and ReLU; sizes are (z, y, x)."""
    spconv = load_spconv()
    conv = spconv.SparseConv3d(in_channels, out_channels, kernel, stride, padding, bias=False, indice_key=key)
    return spconv.SparseSequential(_prepared(conv), _norm(out_channels), nn.ReLU())  # type: ignore[no-any-return]


def sub_m_block(in_channels: int, out_channels: int, key: str) -> nn.Module:
    """Return a submanifold convolution with batch norm and ReLU."""
    return load_spconv().SparseSequential(  # type: ignore[no-any-return]
        sub_m_conv(in_channels, out_channels, key), _norm(out_channels), nn.ReLU()
    )


def _norm(channels: int) -> nn.BatchNorm1d:
    return nn.BatchNorm1d(channels, eps=_BN_EPS, momentum=_BN_MOMENTUM)


class ResidualBlock(nn.Module):
    """SubM, norm, ReLU, SubM, norm, plus identity, ReLU."""

    def __init__(self, channels: int, key: str) -> None:
        super().__init__()
        self.conv1, self.bn1 = sub_m_conv(channels, channels, key), _norm(channels)
        self.conv2, self.bn2 = sub_m_conv(channels, channels, key), _norm(channels)

    def forward(self, sparse: Any) -> Any:
        """Return a sparse tensor on the same voxels."""
        out = self.conv1(sparse)
        out = out.replace_feature(torch.relu(self.bn1(out.features)))
        out = self.conv2(out)
        return out.replace_feature(torch.relu(self.bn2(out.features) + sparse.features))


def sparse_tensor(
    features: Float[Tensor, "V C"], indices: Int[Tensor, "V 4"], shape: tuple[int, int, int], batch_size: int
) -> Any:
    """Return spconv's sparse tensor; ``indices`` are (frame, z, y, x) and ``shape`` is (z, y, x)."""
    # spconv reads the memory as it lies, whatever the strides.
    return load_spconv().SparseConvTensor(features.contiguous(), indices.int().contiguous(), list(shape), batch_size)


def to_dense(sparse: Any) -> Float[Tensor, "B C Z Y X"]:
    """Return the dense map of a sparse tensor; zero where no voxel is occupied."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Using a non-tuple sequence", category=UserWarning)
        dense: Tensor = sparse.dense()
    return dense
