"""A packed model that stays frozen, with a small adapter trained before it: python -m examples.adapter.

A binary classifier of digits is trained and packed. Then its images are turned upside down, which it cannot read. A
small real adapter before the packed model learns to help: the gradient passes through the packed layers, whose bits
never change, so many adapters can share one packed model in memory.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bitorch_qlinear import PackedQLinear, binarize, kernels, pack
from examples.common import accuracy, median_seconds, train
from examples.digits.model import load_digits

FEATURES, CLASSES = 64, 10


class Adapter(nn.Module):
    """A residual of low rank, as LoRA (https://arxiv.org/abs/2106.09685) adds it, here to the features."""

    def __init__(self, features: int, rank: int) -> None:
        """Create the two factors; the second one is 0, so the adapter begins as the identity.

        Args:
            features: Number of features.
            rank: Rank of the residual.
        """
        super().__init__()
        self.down, self.up = nn.Linear(features, rank), nn.Linear(rank, features)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Add the residual.

        Args:
            x: Shape ``(batch, features)``.
        """
        y: Tensor = x + self.up(torch.tanh(self.down(x)))
        return y


def classifier(hidden: int) -> nn.Sequential:
    """Build a float classifier, to be binarized."""
    return nn.Sequential(
        nn.Linear(FEATURES, hidden), nn.BatchNorm1d(hidden), nn.Hardtanh(),
        nn.Linear(hidden, hidden), nn.BatchNorm1d(hidden), nn.Hardtanh(),
        nn.Linear(hidden, hidden), nn.BatchNorm1d(hidden),
        nn.Linear(hidden, CLASSES),
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """Train and pack a classifier, then train an adapter before it.

    Args:
        argv: Arguments to use instead of the process's.
    """
    parser = argparse.ArgumentParser(prog="python -m examples.adapter", description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=256, help="width of the layers (default: %(default)s)")
    parser.add_argument("--rank", type=int, default=32, help="rank of the adapter (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=12, help="passes over the images (default: %(default)s)")
    arguments = parser.parse_args(argv)
    torch.manual_seed(0)
    digits = load_digits(0, torch.device("cpu"))
    turned = digits._replace(x_train=digits.x_train.flip(1), x_test=digits.x_test.flip(1))

    trained = train(binarize(classifier(arguments.hidden)), digits, arguments.epochs)
    packed = pack(trained, fuse=True).requires_grad_(False)
    words = [layer.weight.clone() for layer in packed.modules() if isinstance(layer, PackedQLinear)]
    print(
        f"packed classifier: {accuracy(packed, digits):.1%} of the digits, {accuracy(packed, turned):.1%} upside down"
    )

    adapted = nn.Sequential(Adapter(FEATURES, arguments.rank), packed)
    train(adapted, turned, arguments.epochs, frozen=[packed])
    trainable = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    print(f"with an adapter of {trainable} parameters: {accuracy(adapted, turned):.1%} upside down")

    now = [layer.weight for layer in packed.modules() if isinstance(layer, PackedQLinear)]
    unchanged = all(map(torch.equal, words, now))
    print(f"The packed words are {'unchanged' if unchanged else 'changed'}.")
    seconds = median_seconds({"float32": classifier(arguments.hidden).eval(), "packed": packed}, digits.x_test)
    ratio = seconds["float32"] / seconds["packed"]
    print(f"packed: {ratio:.1f} × float32 at batch {len(digits.x_test)} (kernel {kernels.active()})")


if __name__ == "__main__":
    main()
