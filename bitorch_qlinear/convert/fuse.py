"""Fuses what lies between two packed layers into the first of them: ``pack(model, fuse=True)``.

The product of a packed layer has K + 1 possible values: ``K - 2 · popcount``. If everything between the layer and the
next layer's sign works on each channel alone, each channel has a table of K + 1 bits. torch's own modules compute that
table here. If the bits of a channel change at most once, a scale of ±1 and an integer offset on the product give the
same bits, so the modules are no longer needed.
"""

from __future__ import annotations

import inspect
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from .. import functional
from .._product import has_kernels
from .._torch import has_hooks, is_plain
from ..checkpoint import FUSED_DTYPES, REAL_INPUT, STRICT_INPUT
from ..linear import QLinear
from ..packed import PackedQLinear

__all__ = ["Folded", "fuse", "fusions"]

# The values of these modules do not depend on where an element lies in its tensor. torch computes tanh and similar
# functions by vectors except in the last elements of a tensor, and the two code paths may differ in the last bit.
_EXACT = (
    nn.Identity,
    nn.Dropout,
    nn.AlphaDropout,
    nn.Hardtanh,
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.PReLU,
    nn.Threshold,
    nn.BatchNorm1d,
)
# The table of a layer is computed in parts of about this many values.
_PART = 1 << 20
# An offset may be K + 1, and float32 holds all whole numbers up to 2**24.
_MOST_INPUTS = (1 << 24) - 1
# Two traces at a time would restore each other's changes of nn.Module.
_tracing = threading.RLock()


class Folded(nn.Identity):
    """Takes the place of a module whose work is part of the fused layer before it, and returns its input.

    Attributes:
        original: The repr of the module.
        rows_only: Whether the module counts channels along dimension 1, so that only rows have their channels last.
    """

    def __init__(self, original: str, rows_only: bool) -> None:
        """Keep what the module was."""
        super().__init__()
        self.original = original
        self.rows_only = rows_only

    def forward(self, x: Tensor) -> Tensor:
        """Return x.

        Raises:
            RuntimeError: x is not two-dimensional, but the module's channels were those of dimension 1.
        """
        if self.rows_only and x.dim() != 2:
            raise RuntimeError(
                f"x: expected 2 dimensions, got {x.dim()}: {self.original} was fused for channels that are the last "
                "dimension; use a model that is packed without fuse=True"
            )
        return x

    def extra_repr(self) -> str:
        """Return what the module was."""
        return self.original


@dataclass(frozen=True)
class Chain:
    """The modules from a packed layer to the packed layers that read the signs of what it becomes.

    Attributes:
        layer: The first layer.
        between: The modules that only this chain calls, in their order.
        readers: The layers that read the signs; all of them have the same rule.
    """

    layer: PackedQLinear
    between: tuple[nn.Module, ...]
    readers: tuple[PackedQLinear, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the classes between."""
        return tuple(type(module).__name__ for module in self.between)


@dataclass(frozen=True)
class Fusion:
    """What a fused layer computes.

    Attributes:
        chain: What is fused.
        scale: ±1, float32, shape ``(N,)``.
        offset: Whole numbers, float32, shape ``(N,)``.
        dtype: The dtype of x for which the signs are right.
    """

    chain: Chain
    scale: Tensor
    offset: Tensor
    dtype: torch.dtype


# ---- finding chains ----


class _Tracer(fx.Tracer):
    """Traces with the binary layers, torch's own modules and modules with hooks as single calls.

    A hook on a module that is traced through would see what torch.fx traces with instead of a tensor.
    """

    # Without this, the graph shows no reading of a buffer, such as of running_var.
    proxy_buffer_attributes = True

    def __init__(self, only_sequential: bool = False) -> None:
        super().__init__()
        self.only_sequential = only_sequential
        self.thread = threading.get_ident()

    # While torch.fx traces, it replaces nn.Module's methods in all threads, and others may compute meanwhile.
    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if threading.get_ident() != self.thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if threading.get_ident() != self.thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, (QLinear, PackedQLinear)) or super().is_leaf_module(m, module_qualified_name):
            return True
        return has_hooks(m) or "forward" in m.__dict__ or (self.only_sequential and type(m) is not nn.Sequential)


class _Part:
    """The result of tracing one module: the chains in it, and how else its forward uses the modules inside.

    Attributes:
        outcome: A chain or the reason against one, for each packed layer that forward calls.
        calls: How often forward calls each module, by id.
        read: The ids of the modules of which forward itself reads a tensor.
        whole: The modules that are called but not looked into.
    """

    def __init__(self, root: nn.Module, graph: fx.Graph) -> None:
        """Find the chains of a graph.

        Args:
            root: The module.
            graph: What its forward does.
        """
        self.root = root
        self.nodes = list(graph.nodes)
        self.calls = Counter(id(self._module(node)) for node in self.nodes if node.op == "call_module")
        self.read = {
            id(root.get_submodule(str(node.target).rpartition(".")[0])) for node in self.nodes if node.op == "get_attr"
        }
        self.outcome: dict[int, Chain | str] = {}
        self.whole: list[nn.Module] = []
        for node in self.nodes:
            if node.op != "call_module":
                continue
            module = self._module(node)
            if isinstance(module, PackedQLinear):
                self.outcome[id(module)] = self._chain_from(node, module)
            elif not isinstance(module, QLinear):
                self.whole.append(module)

    def _module(self, node: fx.Node) -> nn.Module:
        return self.root.get_submodule(str(node.target))

    def _chain_from(self, node: fx.Node, layer: PackedQLinear) -> Chain | str:
        if layer.is_fused:
            return ""
        if reason := self._reason_against_first(layer):
            return reason
        between: list[nn.Module] = []
        while True:
            readers = list(node.users)
            modules = [self._module(reader) if reader.op == "call_module" else None for reader in readers]
            packed = [module for module in modules if isinstance(module, PackedQLinear)]
            if packed and len(packed) == len(modules):
                if any(reader.args != (node,) or reader.kwargs for reader in readers):
                    return "the next layer is called with other arguments"
                return _reason_against_readers(packed, between) or Chain(layer, tuple(between), tuple(packed))
            if len(readers) != 1:
                return "its output is not read" if not readers else f"its output is read {len(readers)} times"
            (reader,), (module,) = readers, modules
            if module is None or reader.args != (node,) or reader.kwargs:
                return self._reason_of_node(reader)
            if reason := self._reason_against_between(module, layer.out_features):
                return reason
            between.append(module)
            node = reader

    def _reason_of_node(self, node: fx.Node) -> str:
        if node.op == "output":
            return f"the forward of {type(self.root).__name__} returns its output"
        if node.op == "call_module":
            return f"{node.target} follows, with other arguments"
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
        return f"the function {name} follows; only modules can be fused"

    def _reason_against_first(self, layer: PackedQLinear) -> str:
        if type(layer) is not PackedQLinear or "forward" in layer.__dict__:
            return f"{type(layer).__name__} has a forward of its own"
        if has_hooks(layer):
            return "it has hooks"
        if layer._input_rule == REAL_INPUT:
            return "its input is real, so its product is no whole number"
        if layer.in_features > _MOST_INPUTS:
            return f"it has more than {_MOST_INPUTS} inputs"
        if not is_plain(layer.weight) or layer.weight.is_meta:
            return "its words have no values"
        return self._reason_of_use(layer)

    def _reason_of_use(self, module: nn.Module) -> str:
        name = type(module).__name__
        if self.calls[id(module)] > 1:
            return f"{name} is called {self.calls[id(module)]} times"
        return ""

    def _reason_against_between(self, module: nn.Module, n: int) -> str:
        name = type(module).__name__
        if isinstance(module, QLinear):
            return "the next layer is not packed"
        if type(module) not in _EXACT:
            return f"{name} follows, which is not one of the modules that can be fused"
        if "forward" in module.__dict__:
            return f"{name} follows, with a forward of its own"
        if has_hooks(module):
            return f"{name} follows, with hooks"
        if module.training:
            return f"{name} follows, in training mode: call eval() first"
        if isinstance(module, nn.BatchNorm1d) and (module.running_mean is None or module.num_features != n):
            return f"{name} follows, without running statistics of {n} channels"
        if isinstance(module, nn.PReLU) and module.weight.numel() not in (1, n):
            return f"{name} follows, with {module.weight.numel()} slopes for {n} channels"
        return self._reason_of_use(module)


def _reason_against_readers(readers: list[PackedQLinear], between: list[nn.Module]) -> str:
    for reader in readers:
        if type(reader) is not PackedQLinear or has_hooks(reader) or "forward" in reader.__dict__:
            return "the next layer has hooks or a forward of its own"
        if reader._input_rule == REAL_INPUT:
            return "the next layer reads real values"
    if len({reader._input_rule for reader in readers}) > 1:
        return "the next layers have different sign rules"
    if not between:
        return "nothing lies between it and the next layer"
    return ""


def _graphs(root: nn.Module) -> list[fx.Graph]:
    """Trace forward with the optional arguments given, and with their defaults.

    Raises:
        Exception: The forward cannot be traced. torch.fx and the forward raise errors of many classes then.
    """
    if "forward" in root.__dict__:
        raise TypeError("it has a forward of its own")
    parameters = list(inspect.signature(type(root).forward).parameters.values())[1:]
    defaults: dict[str, Any] = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
    graphs = [_trace(root, _Tracer())]
    if defaults:
        graphs.append(_trace(root, _Tracer(), defaults))
    return graphs


def _trace(root: nn.Module, tracer: fx.Tracer, defaults: dict[str, Any] | None = None) -> fx.Graph:
    """Trace a forward, and undo the attributes that this sets: torch.fx keeps constants, and forward may keep results.

    Raises:
        Exception: The forward cannot be traced.
    """
    with _tracing:
        before = [(module, dict(module.__dict__)) for module in root.modules()]
        try:
            return tracer.trace(root, concrete_args=defaults)
        finally:
            for module, attributes in before:
                for name, value in list(module.__dict__.items()):
                    if name not in attributes:
                        del module.__dict__[name]
                    elif value is not attributes[name]:
                        module.__dict__[name] = attributes[name]


def _parts(module: nn.Module, seen: set[int], notes: dict[int, str]) -> Iterator[list[_Part]]:
    """Yield the ways through a module, and through each module in it that must be looked at by itself.

    Args:
        module: The module.
        seen: The ids of the modules that were looked at.
        notes: Receives, by the layer's id, why a layer is in no part.
    """
    layers = [each for each in module.modules() if isinstance(each, PackedQLinear)]
    if id(module) in seen or isinstance(module, (QLinear, PackedQLinear)) or not layers:
        return
    seen.add(id(module))
    inner: list[nn.Module]
    try:
        parts = [_Part(module, graph) for graph in _graphs(module)]
        inner = [each for part in parts for each in part.whole]
    except Exception as error:
        said = (str(error).splitlines() or [""])[0]
        why = f"torch.fx cannot trace the forward of {type(module).__name__} ({type(error).__name__}: {said:.80})"
        for layer in layers:
            notes.setdefault(id(layer), why)
        parts = []
        if type(module) is nn.Sequential:
            parts = [_Part(module, _trace(module, _Tracer(only_sequential=True)))]
        inner = [each for part in parts for each in part.whole] or list(module.children())
    if parts:
        yield parts
    for each in inner:
        yield from _parts(each, seen, notes)


def _chains(model: nn.Module) -> dict[int, Chain | str]:
    """Return the chain that begins with each packed layer, by the layer's id, or the reason why none does."""
    notes: dict[int, str] = {}
    found: dict[int, Chain | str] = {}
    users: Counter[int] = Counter()
    read: set[int] = set()
    for parts in _parts(model, set(), notes):
        users.update({each for part in parts for each in part.calls})
        for part in parts:
            read |= part.read
            for key, outcome in part.outcome.items():
                before = found.setdefault(key, outcome)
                if before != outcome:
                    other = before if isinstance(before, str) else outcome
                    found[key] = other if isinstance(other, str) else "what follows it depends on forward's arguments"
        first = set(parts[0].outcome)
        for part in parts[1:]:
            for key in first ^ set(part.outcome):
                found[key] = "forward's arguments decide whether it is called"
    for key, outcome in found.items():
        modules = (outcome.layer, *outcome.between) if isinstance(outcome, Chain) else ()
        if any(users[id(each)] > 1 for each in modules):
            found[key] = "it, or a module that follows it, is used in several places"
        for each in modules:
            if id(each) in read:
                found[key] = f"a forward reads tensors of {type(each).__name__} itself"
    for layer in model.modules():
        if isinstance(layer, PackedQLinear):
            found.setdefault(id(layer), notes.get(id(layer), "no forward that was traced calls it"))
    return found


# ---- what a chain computes ----


def _bits(y: Tensor, strict: bool) -> Tensor:
    """Return the bits that a binary layer makes of its input."""
    if has_kernels(y):
        return functional.unpack_bits(functional.pack_bits(y, strict), y.shape[-1], torch.bool)
    return y > 0 if strict else ~(y < 0)


def _evaluate(chain: Chain) -> Fusion | str:
    """Compute the table of a chain and return what replaces it, or the reason why nothing can."""
    layer, k, n = chain.layer, chain.layer.in_features, chain.layer.out_features
    dtype = next(layer.parameters()).dtype
    if dtype not in FUSED_DTYPES:
        return f"its dtype is {dtype}"
    strict = chain.readers[0]._input_rule == STRICT_INPUT
    device = layer.weight.device
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        changes = torch.zeros(n, dtype=torch.int32, device=device)
        place = torch.full((n,), k + 1, dtype=torch.int32, device=device)  # the popcount from which the bit is another
        first = previous = torch.empty(0)
        # All channels are computed at once, in rows, because batch_norm takes another code path for a single column.
        rows = max(1, _PART // max(n, 1))
        for start in range(0, k + 1, rows):
            counts = torch.arange(start, min(start + rows, k + 1), dtype=torch.int32, device=device)
            try:
                y = _outputs(layer, counts, dtype)
                for module in chain.between:
                    y = module(y)
            except Exception as error:
                said = (str(error).splitlines() or [""])[0]
                return f"what follows cannot be computed in {dtype} ({type(error).__name__}: {said:.80})"
            if y.shape != (counts.numel(), n):
                return "what follows changes the shape"
            bits = _bits(y, strict)
            if start == 0:
                first = previous = bits[:1]
            changed = torch.cat([previous, bits[:-1]]) != bits
            changes += changed.sum(0, dtype=torch.int32)
            place = torch.where(changed.any(0), counts[changed.int().argmax(0)], place)
            previous = bits[-1:]
        several = int((changes > 1).sum())
        if several:
            return f"the signs of {several} of {n} channels change more than once: {', '.join(chain.names)}"
        scale = torch.where(first[0], 1.0, -1.0).to(torch.float32)
        # The bit changes between the products K - 2 · place + 2 and K - 2 · place; the limit lies half way.
        offset = -scale * (k + 1 - 2 * place.to(torch.float32))
    return Fusion(chain, scale, offset, dtype)


def _outputs(layer: PackedQLinear, counts: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the layer's output for each popcount: a new tensor of shape ``(counts, N)``, as the operator makes it."""
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    product = (layer.in_features - 2 * counts).to(wide)[:, None].expand(-1, layer.out_features)
    y = product.clone(memory_format=torch.contiguous_format)
    if layer.bias is not None:
        y += layer.bias.to(wide)
    return y.to(dtype)


def fusions(model: nn.Module) -> dict[int, Fusion | str]:
    """Return, by the id of each packed layer of a model, how it can be fused or the reason why it cannot.

    torch.fx calls the forward of the model to trace it. A layer that is fused already has the reason "".
    """
    layers = [layer for layer in model.modules() if isinstance(layer, PackedQLinear)]
    if len(layers) < 2:
        return {id(layer): "" if layer.is_fused else "no other packed layer follows" for layer in layers}
    if model.training:
        reason = "the model is in training mode: call eval() first"
        return {id(layer): "" if layer.is_fused else reason for layer in layers}
    return {
        key: _evaluate(outcome) if isinstance(outcome, Chain) else outcome for key, outcome in _chains(model).items()
    }


def fuse(model: nn.Module) -> dict[int, str]:
    """Fuse, inside a model, each packed layer with the modules up to the next layer's sign, if the signs stay the same.

    Returns:
        The reason why a layer is not fused, or "" if it is, by its id.
    """
    found = fusions(model)
    replaced: dict[int, Folded] = {}
    for outcome in found.values():
        if isinstance(outcome, str):
            continue
        for module in outcome.chain.between:
            several = isinstance(module, nn.PReLU) and module.weight.numel() > 1
            replaced[id(module)] = Folded(repr(module), several or isinstance(module, nn.BatchNorm1d)).eval()
        outcome.chain.layer.absorb(outcome.scale, outcome.offset, outcome.dtype, outcome.chain.names)
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and id(child) in replaced:
                parent.register_module(name, replaced[id(child)])
    return {key: outcome if isinstance(outcome, str) else "" for key, outcome in found.items()}
