"""Modules with a learned shift for each channel, as binary networks since ReActNet have them around the sign.

Zechun Liu et al., "ReActNet: Towards Precise Binary Neural Network with Generalized Activation Functions",
https://arxiv.org/abs/2003.03488
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["ChannelShift", "RPReLU"]


class ChannelShift(nn.Module):
    """``y = x + shift``, with one learned shift for each channel.

    Before a :class:`QLinear` it is ReActNet's RSign: the layer takes the sign of ``x + shift``, so each channel has a
    threshold of its own, ``-shift``. BiT's "move" is the same module.

    Attributes:
        shift: Shape ``(channels,)``; initially 0.
    """

    computes_channels_alone = True

    def __init__(
        self, channels: int, device: torch.device | str | int | None = None, dtype: torch.dtype | None = None
    ) -> None:
        """Create the shifts.

        Args:
            channels: The size of the input's last dimension.
            device: Device of the shifts.
            dtype: Dtype of the shifts.
        """
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(channels, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Add the shifts.

        Args:
            x: Shape ``(..., channels)``.
        """
        return x + self.shift

    def extra_repr(self) -> str:
        """Return the number of channels."""
        return str(self.shift.numel())


class RPReLU(nn.Module):
    """``y = prelu(x + shift_in) + shift_out``, with learned shifts and slope for each channel (ReActNet).

    Attributes:
        shift_in: Shape ``(channels,)``; initially 0.
        slope: The factor of negative values, shape ``(channels,)``; initially 0.25, as in ``nn.PReLU``.
        shift_out: Shape ``(channels,)``; initially 0.
    """

    computes_channels_alone = True

    def __init__(
        self, channels: int, device: torch.device | str | int | None = None, dtype: torch.dtype | None = None
    ) -> None:
        """Create the parameters.

        Args:
            channels: The size of the input's last dimension.
            device: Device of the parameters.
            dtype: Dtype of the parameters.
        """
        super().__init__()
        self.shift_in = nn.Parameter(torch.zeros(channels, device=device, dtype=dtype))
        self.slope = nn.Parameter(torch.full((channels,), 0.25, device=device, dtype=dtype))
        self.shift_out = nn.Parameter(torch.zeros(channels, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Shift, multiply negative values by their slope, and shift again.

        Args:
            x: Shape ``(..., channels)``.
        """
        # F.prelu has its channels in dimension 1, so all other dimensions are flattened into dimension 0.
        rows = (x + self.shift_in).reshape(-1, self.slope.numel())
        return F.prelu(rows, self.slope).reshape(x.shape) + self.shift_out

    def extra_repr(self) -> str:
        """Return the number of channels."""
        return str(self.slope.numel())
