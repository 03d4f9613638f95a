"""An MLP-Mixer whose linear layers are binary, with ReActNet's RSign and RPReLU around them: python -m examples.mixer.

Each image of a digit is 16 patches of 2 × 2 pixels. A block mixes the patches, then the channels, each by a binary
layer with a threshold for each input channel before it (ChannelShift, RSign in the paper), and a real residual around.

MLP-Mixer: https://arxiv.org/abs/2105.01601, ReActNet: https://arxiv.org/abs/2003.03488
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bitorch_qlinear import ChannelShift, QLinear, RPReLU, explain, kernels, pack
from examples.common import accuracy, median_seconds, train
from examples.digits.model import load_digits

PATCHES, PIXELS, CLASSES = 16, 4, 10


def mixing(size: int, binary: bool) -> nn.Sequential:
    """Build the part of a block that mixes the last dimension."""
    if not binary:
        return nn.Sequential(nn.LayerNorm(size), nn.Linear(size, size), nn.PReLU())
    layer = QLinear(size, size, bias=False, gradient_cancellation_threshold=1.0, weight_scale="mean")
    return nn.Sequential(ChannelShift(size), layer, nn.LayerNorm(size), RPReLU(size))


class Block(nn.Module):
    """Mixes patches, then channels."""

    def __init__(self, channels: int, binary: bool) -> None:
        """Create the two parts.

        Args:
            channels: Number of channels of a patch.
            binary: Whether the linear layers are binary.
        """
        super().__init__()
        self.patches, self.channels = mixing(PATCHES, binary), mixing(channels, binary)

    def forward(self, x: Tensor) -> Tensor:
        """Mix.

        Args:
            x: Shape ``(batch, patches, channels)``.
        """
        x = x + self.patches(x.transpose(1, 2)).transpose(1, 2)
        y: Tensor = x + self.channels(x)
        return y


class Mixer(nn.Module):
    """The classifier: a real embedding of the patches, blocks, and a real last layer."""

    def __init__(self, channels: int, blocks: int, binary: bool) -> None:
        """Create the layers.

        Args:
            channels: Number of channels of a patch.
            blocks: Number of blocks.
            binary: Whether the linear layers of the blocks are binary.
        """
        super().__init__()
        self.embed = nn.Linear(PIXELS, channels)
        self.blocks = nn.Sequential(*[Block(channels, binary) for _ in range(blocks)])
        self.classify = nn.Linear(channels, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Classify.

        Args:
            x: Images, shape ``(batch, 64)``.
        """
        patches = x.view(-1, 4, 2, 4, 2).transpose(2, 3).reshape(-1, PATCHES, PIXELS)
        y: Tensor = self.classify(self.blocks(self.embed(patches)).mean(1))
        return y


def main(argv: Sequence[str] | None = None) -> None:
    """Train a binary Mixer and its float twin, pack the binary one, and compare them.

    Args:
        argv: Arguments to use instead of the process's.
    """
    parser = argparse.ArgumentParser(prog="python -m examples.mixer", description=__doc__.splitlines()[0])
    parser.add_argument("--channels", type=int, default=256, help="channels of a patch (default: %(default)s)")
    parser.add_argument("--blocks", type=int, default=3, help="number of blocks (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=12, help="passes over the images (default: %(default)s)")
    arguments = parser.parse_args(argv)
    torch.manual_seed(0)
    digits = load_digits(0, torch.device("cpu"))
    models = {}
    for name, binary in (("float32", False), ("binary", True)):
        models[name] = train(Mixer(arguments.channels, arguments.blocks, binary), digits, arguments.epochs)
        print(f"{name}: test accuracy {accuracy(models[name], digits):.1%}")

    models["packed"] = pack(models["binary"], fuse=True)
    print(f"\n{explain(models['packed'])}\n")
    with torch.inference_mode():
        same = torch.equal(models["packed"](digits.x_test), models["binary"](digits.x_test))
    print(f"The packed model's logits are {'identical' if same else 'different'} for all test images.")
    seconds = median_seconds(models, digits.x_test)
    ratio = seconds["float32"] / seconds["packed"]
    print(f"packed: {ratio:.1f} × float32 at batch {len(digits.x_test)} (kernel {kernels.active()})")


if __name__ == "__main__":
    main()
