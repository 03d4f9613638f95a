"""Numbers of operations for torch.utils.flop_counter: a binary layer counts as much as the float layer it replaces."""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from . import _library

_COUNTER = "torch.utils.flop_counter"


def _product(rows: Sequence[int], words: Sequence[int], k: int, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """Return 2 m n k for m rows and n rows of words, as torch counts addmm; torch passes shapes instead of tensors."""
    return 2 * math.prod(rows[:-1]) * words[0] * k


def _chain(x: Sequence[int], words: Sequence[Sequence[int]], k: int, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """Return the sum over all layers; a layer's n is the next one's k."""
    inputs = [k, *(each[0] for each in words)]
    return sum(_product(x, each, inputs[i]) for i, each in enumerate(words))


def _sign_linear(rows: Sequence[int], weight: Sequence[int], *_: Any, out_shape: Any = None, **__: Any) -> int:
    return _product(rows, weight, weight[1])


def _register(counter: ModuleType) -> None:
    names = ("binary_linear", "linear", "linear_train", "dorefa_linear", "multiply_signs")
    counter.register_flop_formula([getattr(_library.operators, name) for name in names])(_product)
    counter.register_flop_formula(_library.operators.sign_linear)(_sign_linear)
    counter.register_flop_formula(_library.operators.linear_chain)(_chain)


class _AtImport:
    """Registers the formulas when torch's counter is imported, because this package must not import it itself.

    The counter imports triton if that is installed, which takes 0.25 s, a fifth of `import torch` (torch 2.11 for
    CUDA).
    """

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Return None for all modules except the counter, whose spec the other finders return."""
        if name != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                _register(module)

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


if _COUNTER in sys.modules:
    _register(sys.modules[_COUNTER])
else:
    sys.meta_path.insert(0, _AtImport())
