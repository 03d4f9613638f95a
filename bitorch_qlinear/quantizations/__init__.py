"""The quantizations of QLinear: the values that a real tensor becomes before the product, and their gradients.

Values and gradients are those of bitorch 0.4.1 in every floating dtype, and the dtype is kept. A `BinaryRule` says all
that the packed path must know of a sign-like quantization. The float path computes from the same rule, so each
derivative is written once.
"""

from .base import BinaryQuantization, Identity, Quantization
from .dorefa import InputDoReFa, WeightDoReFa
from .progressive_sign import ProgressiveSign, progressive_sign_scale, set_progressive_sign_scale
from .recognition import (
    additions,
    binary_rule,
    depends_on_mode,
    guard,
    is_identity,
    is_ternary,
    level_bits,
    mean_scale,
    own_scale,
    scaled_rule,
)
from .registry import get_quantization, quantization_names, register_quantization
from .rule import BinaryRule, cancel_gradient, quantize
from .scale import mean_magnitude, row_means
from .sign_family import ApproxSign, Sign, SteHeaviside, SwishSign
from .ternary import Ternary, kept_means

__all__ = [
    "ApproxSign",
    "BinaryQuantization",
    "BinaryRule",
    "Identity",
    "InputDoReFa",
    "ProgressiveSign",
    "Quantization",
    "Sign",
    "SteHeaviside",
    "SwishSign",
    "Ternary",
    "WeightDoReFa",
    "additions",
    "binary_rule",
    "cancel_gradient",
    "depends_on_mode",
    "get_quantization",
    "guard",
    "is_identity",
    "is_ternary",
    "kept_means",
    "level_bits",
    "mean_magnitude",
    "mean_scale",
    "own_scale",
    "progressive_sign_scale",
    "quantization_names",
    "quantize",
    "register_quantization",
    "row_means",
    "scaled_rule",
    "set_progressive_sign_scale",
]

# Pickles, and the list of classes that torch.load(weights_only=True) allows, name a class by its module. With this
# folder as the module of them all, a saved model does not depend on which file defines a class.
for _name in __all__:
    if isinstance(globals()[_name], type):
        globals()[_name].__module__ = __name__
