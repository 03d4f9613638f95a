"""A transformer encoder with binary layers, in the style of BiT and BinaryBERT: python -m examples.transformer.

An image of a digit is a sequence of its 8 rows. All linear layers of the blocks are binary: the projections of the
attention and both layers of the feed-forward part. As in BiT, each takes the signs of a shifted input and scales its
weights by their mean magnitude; residuals, LayerNorm and softmax stay real.

BiT: https://arxiv.org/abs/2205.13016, BinaryBERT: https://arxiv.org/abs/2012.15701
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitorch_qlinear import ChannelShift, binarize, explain_binarize
from examples.common import accuracy, make_parser, pack_and_compare, start, train
from examples.digits.model import load_digits, positive

ROWS, PIXELS, CLASSES = 8, 8, 10
FLOAT_RATE, BINARY_RATE = 3e-3, 1e-2


class Block(nn.Module):
    """Self-attention and a feed-forward part, each with LayerNorm before and a residual around it."""

    def __init__(self, width: int, heads: int) -> None:
        """Create the layers, all real; ``binarize`` exchanges the linear ones.

        What lies between two linear layers is in one ``nn.Sequential`` with them, so that ``pack(model, fuse=True)``
        can replace it by limits.

        Args:
            width: Size of a token.
            heads: Number of attention heads.
        """
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_feed = nn.LayerNorm(width), nn.LayerNorm(width)
        self.project = nn.Sequential(ChannelShift(width), nn.Linear(width, 3 * width))
        self.join = nn.Sequential(ChannelShift(width), nn.Linear(width, width))
        self.feed = nn.Sequential(
            ChannelShift(width), nn.Linear(width, 4 * width), nn.PReLU(), ChannelShift(4 * width),
            nn.Linear(4 * width, width),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """Compute the block.

        Args:
            x: Shape ``(batch, tokens, width)``.
        """
        batch, tokens, width = x.shape
        projected = self.project(self.norm_attention(x)).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(*projected)
        x = x + self.join(attended.transpose(1, 2).reshape(batch, tokens, width))
        y: Tensor = x + self.feed(self.norm_feed(x))
        return y


class Encoder(nn.Module):
    """The classifier: a real embedding with learned positions, blocks, and a real last layer."""

    def __init__(self, width: int, blocks: int, heads: int = 4) -> None:
        """Create the layers.

        Args:
            width: Size of a token.
            blocks: Number of blocks.
            heads: Number of attention heads.
        """
        super().__init__()
        self.embed = nn.Linear(PIXELS, width)
        self.positions = nn.Parameter(torch.randn(ROWS, width) * 0.02)
        self.blocks = nn.Sequential(*[Block(width, heads) for _ in range(blocks)])
        self.norm = nn.LayerNorm(width)
        self.classify = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Classify.

        Args:
            x: Images, shape ``(batch, 64)``.
        """
        tokens = self.embed(x.view(-1, ROWS, PIXELS)) + self.positions
        y: Tensor = self.classify(self.norm(self.blocks(tokens)).mean(1))
        return y


def main(argv: Sequence[str] | None = None) -> None:
    """Train a float encoder and a binary one, pack the binary one, and compare them.

    Args:
        argv: Arguments to use instead of the process's.
    """
    parser = make_parser("transformer", "Train a transformer with binary layers and its float32 twin, and pack it.")
    parser.add_argument("--width", type=positive, default=192, help="size of a token (default: %(default)s)")
    parser.add_argument("--blocks", type=positive, default=2, help="number of blocks (default: %(default)s)")
    parser.add_argument("--epochs", type=positive, default=12, help="passes over the images (default: %(default)s)")
    arguments = start(parser, argv)
    digits = load_digits(0, torch.device("cpu"))
    twin = Encoder(arguments.width, arguments.blocks)
    # The first and the last linear layer, which are the embedding and the classifier, stay real by default.
    print(explain_binarize(twin, weight_scale="mean"), end="\n\n")
    model = binarize(twin, weight_scale="mean")  # a copy with the same initial weights
    train(twin, digits, arguments.epochs, FLOAT_RATE)
    print(f"float32: test accuracy {accuracy(twin, digits):.1%}")
    train(model, digits, arguments.epochs, BINARY_RATE)
    print(f"binary: test accuracy {accuracy(model, digits):.1%}")

    pack_and_compare(model, twin, digits.x_test)


if __name__ == "__main__":
    main()
