"""A transformer encoder with binary layers, in the style of BiT and BinaryBERT: python -m examples.transformer.

An image of a digit is a sequence of its 8 rows. All linear layers of the blocks are binary: the projections of the
attention and both layers of the feed-forward part. As in BiT, each takes the signs of a shifted input and scales its
weights by their mean magnitude; residuals, LayerNorm and softmax stay real.

BiT: https://arxiv.org/abs/2205.13016, BinaryBERT: https://arxiv.org/abs/2012.15701
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitorch_qlinear import ChannelShift, QLinear, binarize, explain, kernels, pack
from examples.common import accuracy, median_seconds, train
from examples.digits.model import load_digits

ROWS, PIXELS, CLASSES = 8, 8, 10


class Block(nn.Module):
    """Self-attention and a feed-forward part, each with LayerNorm before and a residual around it."""

    def __init__(self, width: int, heads: int) -> None:
        """Create the layers, all real; ``binarize`` exchanges the linear ones.

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
    parser = argparse.ArgumentParser(prog="python -m examples.transformer", description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=128, help="size of a token (default: %(default)s)")
    parser.add_argument("--blocks", type=int, default=2, help="number of blocks (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=12, help="passes over the images (default: %(default)s)")
    arguments = parser.parse_args(argv)
    torch.manual_seed(0)
    digits = load_digits(0, torch.device("cpu"))
    models: dict[str, nn.Module] = {"float32": Encoder(arguments.width, arguments.blocks)}
    # The first and the last linear layer, which are the embedding and the classifier, stay real by default.
    models["binary"] = binarize(models["float32"], weight_scale="mean")
    for name, model in models.items():
        train(model, digits, arguments.epochs)
        print(f"{name}: test accuracy {accuracy(model, digits):.1%}")

    models["packed"] = pack(models["binary"], fuse=True)
    print(f"\n{explain(models['packed'])}\n")
    assert not any(isinstance(module, QLinear) for module in models["packed"].modules())
    with torch.inference_mode():
        same = torch.equal(models["packed"](digits.x_test), models["binary"](digits.x_test))
    print(f"The packed model's logits are {'identical' if same else 'different'} for all test images.")
    seconds = median_seconds(models, digits.x_test)
    ratio = seconds["float32"] / seconds["packed"]
    print(f"packed: {ratio:.1f} × float32 at batch {len(digits.x_test)} (kernel {kernels.active()})")


if __name__ == "__main__":
    main()
