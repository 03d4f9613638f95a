"""A packed model that stays frozen, with a small adapter trained before it: python -m examples.adapter.

A binary classifier of digits is trained and packed. Then its images are turned upside down, which it cannot read. A
small real adapter before the packed model learns to help: the gradient passes through the packed layers, whose bits
never change, so many adapters can share one packed model in memory.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitorch_qlinear import PackedQLinear, binarize, pack
from examples.common import accuracy, check_parity, make_parser, median_seconds, print_speed, setting, start, train
from examples.digits.model import Digits, load_digits, positive

FEATURES, CLASSES = 64, 10
BINARY_RATE, ADAPTER_RATE = 1e-2, 5e-3


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


def build_classifier(hidden: int) -> nn.Sequential:
    """Return a float classifier, to be binarized."""
    return nn.Sequential(
        nn.Linear(FEATURES, hidden), nn.BatchNorm1d(hidden), nn.Hardtanh(),
        nn.Linear(hidden, hidden), nn.BatchNorm1d(hidden), nn.Hardtanh(),
        nn.Linear(hidden, hidden), nn.BatchNorm1d(hidden),
        nn.Linear(hidden, CLASSES),
    )  # fmt: skip


def train_step(model: nn.Module, digits: Digits) -> None:
    """Compute the gradients of one batch."""
    model.zero_grad()
    F.cross_entropy(model(digits.x_train[:64]), digits.y_train[:64]).backward()


def main(argv: Sequence[str] | None = None) -> None:
    """Train and pack a classifier, then train an adapter before it.

    Args:
        argv: Arguments to use instead of the process's.
    """
    parser = make_parser("adapter", "Train an adapter before a packed classifier, whose bits stay as they are.")
    parser.add_argument("--hidden", type=positive, default=512, help="width of the layers (default: %(default)s)")
    parser.add_argument("--rank", type=positive, default=32, help="rank of the adapter (default: %(default)s)")
    parser.add_argument("--epochs", type=positive, default=8, help="passes over the images (default: %(default)s)")
    arguments = start(parser, argv)
    digits = load_digits(0, torch.device("cpu"))
    turned = digits._replace(x_train=digits.x_train.flip(1), x_test=digits.x_test.flip(1))

    model = train(binarize(build_classifier(arguments.hidden)), digits, arguments.epochs, BINARY_RATE)
    packed = pack(model, fuse=True).requires_grad_(False)
    check_parity(model, packed, digits.x_test)
    words = [layer.weight.clone() for layer in packed.modules() if isinstance(layer, PackedQLinear)]
    print(
        f"packed classifier: {accuracy(packed, digits):.1%} of the digits, {accuracy(packed, turned):.1%} upside down"
    )

    adapted = nn.Sequential(Adapter(FEATURES, arguments.rank), packed)
    train(adapted, turned, arguments.epochs, ADAPTER_RATE, frozen=[packed])
    trainable = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    print(f"with an adapter of {trainable} parameters: {accuracy(adapted, turned):.1%} upside down")

    now = [layer.weight for layer in packed.modules() if isinstance(layer, PackedQLinear)]
    unchanged = all(map(torch.equal, words, now))
    print(f"The packed words are {'unchanged' if unchanged else 'changed'}.")

    twin = build_classifier(arguments.hidden).eval().requires_grad_(False)
    print_speed(twin, packed, digits.x_test, (1, 64, 256))
    models = {"twin": nn.Sequential(Adapter(FEATURES, arguments.rank), twin), "packed": adapted}
    seconds = median_seconds({name: functools.partial(train_step, each, turned) for name, each in models.items()})
    ratio = seconds["twin"] / seconds["packed"]
    print(f"A training step of the adapter before it: {ratio:.1f} × at batch 64 ({setting()})")


if __name__ == "__main__":
    main()
