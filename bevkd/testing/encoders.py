"""What an encoder has to hold."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bevkd.data.collate import Batch
from bevkd.data.join import View
from bevkd.grid import BEVGrid
from bevkd.models.encoders.base import CameraMaps
from bevkd.testing.frames import MadeUpFrames
from bevkd.testing.tools import batch_of, check_gradients, close


class EncoderTests:
    """Subclass it and define :meth:`encoder` and :attr:`view`."""

    grid = BEVGrid(x_m=(-12.8, 12.8), y_m=(-9.6, 9.6), z_m=(-5.0, 3.0), cell_m=1.6)
    """Not square, so that exchanged axes show."""

    view: View
    """The sensors that the encoder reads, and the size of its images."""

    def encoder(self) -> nn.Module:
        """Return the encoder for ``grid``, drawn anew by every call, as small as it gets."""
        raise NotImplementedError("define encoder()")

    def source(self) -> MadeUpFrames:
        """Return frames that hold what the encoder reads."""
        return MadeUpFrames(("car", "pedestrian"), self.grid)

    def _encoder(self) -> nn.Module:
        torch.manual_seed(0)
        return self.encoder()

    def _batch(self, *frames: int) -> Batch:
        source = self.source()
        return batch_of(source, self.view, [source.tokens[frame] for frame in frames])

    def test_it_maps_sensors_to_the_grid(self) -> None:
        """``bev_low`` has ``out_channels`` channels and one cell per cell of the grid, ``fineness`` times finer."""
        encoder = self._encoder().eval()
        bev_low = _map(encoder(self._batch(0, 1))).detach()
        rows, columns = self.grid.shape
        finer = int(getattr(encoder, "fineness", 1))
        channels: Any = encoder.out_channels
        assert tuple(bev_low.shape) == (2, channels, rows * finer, columns * finer), tuple(bev_low.shape)
        assert bool(bev_low.isfinite().all()), "values that are not finite"
        assert float(bev_low.abs().sum()) > 0, "a map of zeros"

    def test_a_frame_does_not_depend_on_its_batch(self) -> None:
        """In eval mode the frames beside it change a frame's map by no more than rounding."""
        encoder = self._encoder().eval()
        together, alone = _map(encoder(self._batch(1, 0))), _map(encoder(self._batch(0)))
        close(together[1], alone[0], "bev_low")
        assert not torch.equal(together[0], together[1]), "every frame has the same map"

    def test_gradients_reach_every_parameter(self) -> None:
        """In training mode no part of the encoder is left out of the backward pass."""
        encoder = self._encoder().train()
        _total(encoder(self._batch(0, 1))).backward()  # type: ignore[no-untyped-call]
        check_gradients(encoder)

    def test_weights_say_everything(self) -> None:
        """An encoder with the weights of another gives its map, so that checkpoints are complete."""
        first, second = self._encoder().train(), self.encoder()
        first(self._batch(0, 1))  # moves running statistics
        second.load_state_dict(first.state_dict(), strict=True)
        batch = self._batch(0)
        close(_map(second.eval()(batch)), _map(first.eval()(batch)), "bev_low")

    def test_sensors_that_see_nothing_give_a_finite_map(self) -> None:
        """No returns at all, and black images, are frames like others."""
        source = MadeUpFrames(("car",), self.grid, points=0, radar=0)
        batch = batch_of(source, self.view, source.tokens[:2])
        if batch.images is not None:
            batch.images.zero_()
        assert bool(_map(self._encoder().eval()(batch)).isfinite().all()), "values that are not finite"


def _map(output: Any) -> Tensor:
    """Return ``bev_low`` of what an encoder returns, beside which there may be maps of its images."""
    bev_low: Tensor = output.bev_low if isinstance(output, CameraMaps) else output
    return bev_low


def _total(output: Any) -> Tensor:
    """Return a number that all outputs of an encoder have a share in."""
    parts = output if isinstance(output, tuple) else (output,)
    return torch.stack([part.float().square().mean() for part in parts if isinstance(part, Tensor)]).sum()
