"""An MLP-Mixer whose wide layers are binary, with ReActNet's shifts around them: python -m examples.mixer.

Each image of a digit is 16 patches of 2 × 2 pixels. A block mixes the patches, then the channels of each patch. The two
layers that mix channels have nearly all weights and are binary. The order is that of ReActNet: RSign (`ChannelShift`
before the sign), binary layer, BatchNorm, residual, RPReLU.

The 16 × 16 layer that mixes patches stays real. It has 1/2000 of the block's weights, a sum of 16 signs has only 17
values, and a binary layer mixes the last dimension, so its input would have to be transposed and copied.

MLP-Mixer: https://arxiv.org/abs/2105.01601, ReActNet: https://arxiv.org/abs/2003.03488
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bitorch_qlinear import ChannelShift, QLinear, RPReLU
from examples.common import accuracy, make_parser, pack_and_compare, start, train
from examples.digits.model import load_digits, positive

PATCHES, PIXELS, CLASSES = 16, 4, 10
EXPANSION = 4
FLOAT_RATE, BINARY_RATE = 3e-3, 2e-2


def binary_layer(inputs: int, outputs: int) -> QLinear:
    """Return a binary layer; the BatchNorm behind it has the bias."""
    return QLinear(inputs, outputs, bias=False, gradient_cancellation_threshold=1.0)


class Block(nn.Module):
    """Mixes patches, then channels, each with a residual around it."""

    def __init__(self, channels: int, binary: bool) -> None:
        """Create the layers.

        Args:
            channels: Number of channels of a patch.
            binary: Whether the layers that mix channels are binary.
        """
        super().__init__()
        hidden = EXPANSION * channels
        self.norm = nn.LayerNorm(channels)
        self.patches = nn.Conv1d(PATCHES, PATCHES, kernel_size=1)  # mixes dimension 1 without a transposed copy
        self.channels: nn.Sequential
        if binary:
            # The sign is the nonlinearity in the middle. The BatchNorm before it has a shift, as RSign has.
            self.channels = nn.Sequential(
                ChannelShift(channels), binary_layer(channels, hidden), nn.BatchNorm1d(hidden),
                binary_layer(hidden, channels), nn.BatchNorm1d(channels),
            )  # fmt: skip
            self.activation: nn.Module = RPReLU(channels)
        else:
            self.channels = nn.Sequential(
                nn.LayerNorm(channels), nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, channels)
            )
            self.activation = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Mix.

        Args:
            x: Shape ``(batch, patches, channels)``.
        """
        x = x + self.patches(self.norm(x)).relu()
        # BatchNorm1d has the channels in dimension 1, so each patch becomes a row.
        y: Tensor = self.activation(x + self.channels(x.flatten(0, 1)).view(x.shape))
        return y


class Mixer(nn.Module):
    """The classifier: a real embedding of the patches, blocks, and a real last layer."""

    def __init__(self, channels: int, blocks: int, binary: bool) -> None:
        """Create the layers.

        Args:
            channels: Number of channels of a patch.
            blocks: Number of blocks.
            binary: Whether the layers of the blocks that mix channels are binary.
        """
        super().__init__()
        self.embed = nn.Linear(PIXELS, channels)
        self.blocks = nn.Sequential(*[Block(channels, binary) for _ in range(blocks)])
        self.norm = nn.LayerNorm(channels)
        self.classify = nn.Linear(channels, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Classify.

        Args:
            x: Images, shape ``(batch, 64)``.
        """
        patches = x.view(-1, 4, 2, 4, 2).transpose(2, 3).reshape(-1, PATCHES, PIXELS)
        y: Tensor = self.classify(self.norm(self.blocks(self.embed(patches))).mean(1))
        return y


def main(argv: Sequence[str] | None = None) -> None:
    """Train a binary Mixer and its float twin, pack the binary one, and compare them.

    Args:
        argv: Arguments to use instead of the process's.
    """
    parser = make_parser("mixer", "Train an MLP-Mixer with binary layers and its float32 twin, and pack it.")
    parser.add_argument("--channels", type=positive, default=256, help="channels of a patch (default: %(default)s)")
    parser.add_argument("--blocks", type=positive, default=2, help="number of blocks (default: %(default)s)")
    parser.add_argument("--epochs", type=positive, default=8, help="passes over the images (default: %(default)s)")
    arguments = start(parser, argv)
    digits = load_digits(0, torch.device("cpu"))
    twin = Mixer(arguments.channels, arguments.blocks, binary=False)
    train(twin, digits, arguments.epochs, FLOAT_RATE)
    print(f"float32: test accuracy {accuracy(twin, digits):.1%}")
    model = Mixer(arguments.channels, arguments.blocks, binary=True)
    train(model, digits, arguments.epochs, BINARY_RATE)
    print(f"binary: test accuracy {accuracy(model, digits):.1%}")

    pack_and_compare(model, twin, digits.x_test)


if __name__ == "__main__":
    main()
