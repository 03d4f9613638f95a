"""FusedSequential: an ``nn.Sequential`` whose packed layers hand each other words, and compare with limits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from . import _C, _library
from ._fold import (
    FORWARDS,
    InputLimits,
    Limits,
    counts_channels_first,
    fold_inputs,
    fold_modules,
    reason_against_before,
    reason_against_between,
)
from ._product import wants_gradient
from ._torch import (
    CALL_HOOKS,
    MODULE_CALLS,
    any_function_mode,
    any_global_hook,
    any_hooks,
    does_more,
    has_own_call,
    is_plain,
    operator_entry,
)
from .checkpoint import SIGN_INPUTS, STRICT_INPUT, TERNARY_WEIGHT
from .packed import FEW_WORDS, PackedQLinear

__all__ = ["FusedSequential", "fuse_sequentials", "fusions"]

# Looked up once, because a name in a module of a module costs 20 ns in every call.
_compiling = torch.compiler.is_compiling
_STRIDED = torch.strided
_grad_enabled = torch.is_grad_enabled
_pack_bits = operator_entry(_library.operators.pack_bits)
_linear_chain = operator_entry(_library.operators.linear_chain)
_same_values = operator_entry(_library.operators.same_values)
_record_values = _library.operators.record_values

# Attributes of nn.Module itself that a forward does not read. Tensors are compared by their values.
_OF_TORCH = nn.Module().__dict__.keys() - {"training"}
# What linear_chain gets in place of the form of a layer that has none.
_NO_FORM = torch.empty(0, dtype=torch.uint8)
# The operators that hand on words compute one product of signs, and ternary weights need two.
_TERNARY = "its weights are ternary"
# Only attributes of these types are compared.
_SIMPLE = (bool, int, float, str, type(None))
# What the numbers of a rule mean is written in csrc/module_state.h.
_ANYTHING, _SAME, _EMPTY, _TABLE, _TENSOR = range(5)
# DLPack's interface in C, by which _C reads tensors; an older torch has none.
_EXCHANGE, _IS_NEGATIVE = getattr(Tensor, "__dlpack_c_exchange_api__", None), Tensor.is_neg
# So many calls in turn must find the same values before limits are computed again, however often they changed.
_MOST_SIGHTINGS = 8


class FusedSequential(nn.Sequential):
    """Compute what ``nn.Sequential`` computes, with words instead of floats between packed layers.

    A :class:`PackedQLinear` whose outputs only reach the signs of the next PackedQLinear, through modules that compute
    each channel alone, writes these signs itself: ``popcount <= limit`` for each channel. The limits come from the
    modules themselves, evaluated for each of the K + 1 values that a product can have, so the output is that of
    ``nn.Sequential`` bit for bit. A channel whose sign changes more than once, as that of a ``PReLU`` with a negative
    slope does, has several limits, unless more than one in four channels would need a further one.

    The modules stay what they are: indexing, slicing, iteration, ``state_dict`` and gradients are those of
    ``nn.Sequential``. Each call compares everything that the limits were computed from (the values of parameters and
    buffers, attributes, modes, hooks) and does not use limits of other values.

    Modules before a packed layer whose output only reaches its signs become limits on its inputs, if they keep or
    reverse the order of each channel's values: ``BatchNorm1d``, ``Hardtanh``, ``ReLU``, ``ReLU6``, ``LeakyReLU`` and
    ``PReLU`` without negative slopes, ``Dropout``, ``AlphaDropout``, ``Identity``, :class:`ChannelShift` and
    :class:`RPReLU`, in eval mode and not in place. Inputs that are not contiguous pass through the modules.

    A call computes the modules one after another, as ``nn.Sequential`` does, in these cases: an output may need a
    gradient (call the model in ``torch.inference_mode()`` or ``torch.no_grad()``), under autocast, ``torch.func``,
    ``torch.compile`` and ``torch.export``, on another device than a CPU, in a thread that flushes subnormal numbers
    (``torch.set_flush_denormal``; it counts in the calling thread only), and for the first calls with new values or
    another dtype.

    Modules that may lie between are ``BatchNorm1d``, ``Hardtanh``, ``ReLU``, ``ReLU6``, ``LeakyReLU``, ``PReLU``,
    ``Threshold``, ``Dropout``, ``AlphaDropout`` and ``Identity``, all in eval mode, :class:`ChannelShift` and
    :class:`RPReLU`, also inside nested ``nn.Sequential``, and modules of a class of your own that sets
    ``computes_channels_alone = True``. That promises: an output depends only on the input at the same place, on its
    channel (the last dimension), and on the module's own parameters, buffers, and attributes that are numbers or
    strings (not those of its class), and a call has no other effect. A subclass with another forward must promise it
    again.

    :func:`bitorch_qlinear.explain` reports for each packed layer whether it hands on words, or why not.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Compute the output.

        Args:
            input: The input of the first module.

        Raises:
            RuntimeError: A module exchanges modules of this one during the call.
        """
        # A hook of all modules also sees the calls of nested nn.Sequential, which the plan leaves out.
        if type(input) is not Tensor or _compiling() or any_global_hook():
            return super().forward(input)  # type: ignore[no-any-return, no-untyped-call]
        x, plan = input, self._current_plan()
        for step in plan.steps:
            folded = step.limits_for(x) if isinstance(step, Chain) else None
            if folded is not None:
                x = folded.run(x)
                continue
            for module in step.modules if isinstance(step, Chain) else (step,):
                x = module(x)
                if not plan.fits(self):
                    name = type(module).__name__
                    raise RuntimeError(f"{name}: exchanged modules of the FusedSequential that calls it")
        return x

    def fuse(self, dtype: torch.dtype | None = None) -> FusedSequential:
        """Compute the limits now instead of in the second call with the same values.

        Args:
            dtype: The dtype of the inputs; None takes that of each first layer's bias, or the default.

        Returns:
            self
        """
        for chain in self._current_plan().chains:
            chain.fold(dtype or _dtype_of(chain.layers[0]))
        return self

    def _current_plan(self) -> Plan:
        plan: Plan | None = self.__dict__.get("_plan")
        if plan is None or not plan.fits(self):
            plan = self.__dict__["_plan"] = Plan(self)
        return plan

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without the limits, which a copy computes again."""
        return {name: value for name, value in self.__dict__.items() if name != "_plan"}


def is_sequential(module: nn.Module | None) -> bool:
    """Whether a call of the module calls its children one after another and does nothing else."""
    return type(module) in (nn.Sequential, FusedSequential) and not _has_own_call(module)  # type: ignore[arg-type]


def _has_own_call(module: nn.Module) -> bool:
    """Whether a call of the module does more than its class's forward."""
    return has_own_call(module) or "_compiled_call_impl" in module.__dict__


def _flatten(sequential: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules that a call of an ``nn.Sequential`` calls, and each nested ``nn.Sequential`` before its own."""
    for child in sequential._modules.values():
        yield child  # type: ignore[misc]  # it may be None, which nn.Sequential calls, too
        if isinstance(child, nn.Sequential) and is_sequential(child):
            yield from _flatten(child)


def _ids_of_children(module: nn.Module) -> list[int]:
    return [id(child) for child in module._modules.values()]


class _State(_C.ModuleState):
    """A ModuleState together with everything of which it only has the addresses."""

    def __init__(
        self,
        modules: list[tuple[nn.Module, list[Any]]],
        pinned: Sequence[tuple[object, str, object]] = (),
        tensors: Sequence[Tensor] = (),
        record: Tensor = _NO_FORM,
    ) -> None:
        """Keep the present state.

        Args:
            modules: The modules, and for each of them the rules by which its attributes are compared.
            pinned: Objects, names and values of other attributes.
            tensors: The tensors to which the rules refer.
            record: Their values, from `record_values`.
        """
        super().__init__(modules, list(pinned), list(tensors), record, _EXCHANGE, _IS_NEGATIVE)
        types = [type(module) for module, _ in modules], [type(tensor) for tensor in tensors]
        self._kept = modules, pinned, types, record


class Plan:
    """The order of a FusedSequential's calls, with its chains of packed layers.

    Attributes:
        steps: What is called, one after another.
        chains: The chains among the steps.
    """

    def __init__(self, root: nn.Module) -> None:
        """Find the chains.

        Args:
            root: The module whose calls are planned.
        """
        found = list(_flatten(root))
        self._root = root
        containers = [root, *(module for module in found if is_sequential(module))]
        # The chains and steps keep the children, so their ids belong to no other objects.
        self._containers = [(module, _ids_of_children(module)) for module in containers]
        self._state: _State | None = None
        self.steps: list[Any] = []
        self.chains: list[Chain] = []
        modules = [module for module in found if not is_sequential(module)]
        while modules:
            chain = Chain.beginning(modules)
            if chain is None:
                self.steps.append(modules.pop(0))
            else:
                self.steps.append(chain)
                self.chains.append(chain)
                del modules[: len(chain.modules)]

    def fits(self, root: nn.Module) -> bool:
        """Whether the modules are still those of the plan; not so in a shallow copy of the root."""
        if root is not self._root:
            return False
        state = self._state
        if state is not None and state.same():
            return True
        if not self._fits():
            return False
        self._compare_faster()
        return True

    def _compare_faster(self) -> None:
        """Let C++ compare from now on, if the modules are still those of the plan."""
        rules = [
            (module, [_rule_of_container(module is self._root, *each) for each in list(module.__dict__.items())])
            for module, _ in self._containers
        ]
        state = _State(rules)
        # The two agree only if they are of the same state, although another thread may write meanwhile.
        if state.same() and self._fits():
            self._state = state

    def _fits(self) -> bool:
        for module, children in self._containers:
            if _ids_of_children(module) != children:
                return False
            if module is not self._root and not is_sequential(module):
                return False
        return True


def _rule_of_container(is_root: bool, name: str, value: Any) -> tuple[str, int, Any]:
    """Return the rule by which ``_C.ModuleState`` compares an attribute of a module that calls its children in turn.

    Args:
        is_root: Whether it is the outermost one, which is being called, so that its hooks do not matter.
        name: The name of the attribute.
        value: Its value.
    """
    if name == "_modules":
        return name, _TABLE, [(key, _SAME, child) for key, child in list(value.items())]
    return name, _EMPTY if name in CALL_HOOKS and not is_root else _ANYTHING, None


class Chain:
    """Packed layers that follow each other, with the modules between them and those before the first one.

    Attributes:
        modules: All modules in the order of their calls.
        before: The modules before the first layer that may become limits on its inputs.
        layers: The packed layers among them.
        between: The modules after each layer; none after the last.
    """

    def __init__(
        self, before: list[nn.Module], layers: list[PackedQLinear], between: list[tuple[nn.Module, ...]]
    ) -> None:
        """Keep the modules.

        Args:
            before: The modules before the first layer.
            layers: The packed layers.
            between: The modules after each layer except the last.
        """
        self.before, self.layers, self.between = before, layers, [*between, ()]
        self.modules = list(before)
        for layer, after in zip(layers, self.between, strict=True):
            self.modules += [layer, *after]
        self._folded: dict[torch.dtype, Folded] = {}
        self._seen: dict[torch.dtype, tuple[Snapshot | None, int]] = {}
        self._folds = 0

    @classmethod
    def beginning(cls, modules: list[nn.Module]) -> Chain | None:
        """Return the chain that begins with the first of the modules, or None if limits would replace nothing."""
        place = _layer_after(modules, 0)
        if isinstance(place, str):
            return None
        before, layers, between = modules[:place], [], []
        while not isinstance(reader := _reader_after(modules, place), str):
            layers.append(modules[place])
            between.append(tuple(modules[place + 1 : reader]))
            place = reader
        layers.append(modules[place])
        return cls(before, layers, between) if before or between else None  # type: ignore[arg-type]

    def limits_for(self, x: Any) -> Folded | None:
        """Return the limits if they are right for an input and no gradient is asked for."""
        if not _is_plain_input(x) or does_more():
            return None
        dtype = x.dtype
        folded = self._folded.get(dtype)
        if folded is not None and folded.snapshot.holds():
            if dtype in self._seen:
                self._seen.pop(dtype, None)  # only calls in turn count
            return folded if folded.takes(x) and not self._is_differentiated(x, folded.snapshot) else None
        # Values that change from call to call are not worth a table, so it is computed in a later call with the same.
        snapshot, sightings = self._seen.get(dtype, (None, 0))
        if snapshot is None or not snapshot.holds():
            self._seen[dtype] = Snapshot.of(self.modules), 1
            return None
        if self._is_differentiated(x, snapshot):
            return None
        if sightings < min(self._folds, _MOST_SIGHTINGS):
            self._seen[dtype] = snapshot, sightings + 1
            return None
        folded = self.fold(dtype)
        return folded if folded is not None and folded.takes(x) else None

    @staticmethod
    def _is_differentiated(x: Tensor, snapshot: Snapshot) -> bool:
        return _grad_enabled() and wants_gradient(x, *snapshot.tensors())

    def fold(self, dtype: torch.dtype) -> Folded | None:
        """Compute the limits, to be used from now on; None if they cannot be computed now, or their origin changes."""
        snapshot = None if _compiling() or does_more() else Snapshot.of(self.modules)
        if snapshot is None:
            return None
        folded = Folded(snapshot, self, self.input_limits(dtype), self.limits(dtype))
        if not snapshot.holds():
            return None
        snapshot.compare_faster()
        self._folds += 1
        self._folded[dtype] = folded
        return folded

    def folded(self, dtype: torch.dtype) -> Folded | None:
        """Return the limits for a dtype if they are those of the present values, or compute them."""
        folded = self._folded.get(dtype)
        return folded if folded is not None and folded.snapshot.holds() else self.fold(dtype)

    def input_limits(self, dtype: torch.dtype) -> InputLimits | str:
        """Return what replaces the modules before the first layer, or the reason why nothing does."""
        if not self.before:
            return "no module precedes that can be folded"
        with _plainly():
            return fold_inputs(self.before, self.layers[0], dtype)

    def limits(self, dtype: torch.dtype) -> list[Limits | str]:
        """Return what replaces the modules after each layer except the last, or the reason why nothing does."""
        with _plainly():
            return [
                fold_modules(layer, between, reader, dtype)
                for layer, between, reader in zip(self.layers, self.between, self.layers[1:], strict=False)
            ]


@contextmanager
def _plainly() -> Iterator[None]:
    """Compute on the CPU, without gradients."""
    with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False), torch.device("cpu"):
        yield


def _is_plain_input(x: Any) -> bool:
    """Whether x is a strided tensor on the CPU, as a module before may give something else.

    A quantized tensor has a dtype for which there are no limits.
    """
    return type(x) is Tensor and x.is_cpu and x.layout is _STRIDED and not x.is_nested


@dataclass(frozen=True)
class Segment:
    """Layers that hand on words, and the modules that are called on the last one's output.

    Attributes:
        layers: The layers.
        limits: What each layer except the last compares its counts with.
        flips: The bits that are negated after that.
        toggles: The bits of single channels that are negated again, or None if there are none.
        after: The modules that follow.
    """

    layers: list[PackedQLinear]
    limits: list[Tensor]
    flips: list[Tensor]
    toggles: list[Tensor] | None
    after: tuple[nn.Module, ...]

    def run(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Compute the output of the last module.

        Args:
            x: Real values, or words.
            dtype: The dtype of the last layer's output.
        """
        layers = self.layers
        first, last = layers[0], layers[-1]
        if len(layers) == 1 and x.dtype is dtype:
            x = first(x)
        else:
            x = _linear_chain(
                x,
                [layer._buffers["weight"] for layer in layers],
                first.in_features,
                self.limits,
                self.flips,
                last._parameters["bias"],
                prepared=[_form_of(layer) for layer in layers],
                out_dtype=dtype,
                strict=first._input_rule == STRICT_INPUT,
                scale=last._buffers["scale"],
                toggles=self.toggles,
            )
        for module in self.after:
            x = module(x)
        return x


def _form_of(layer: PackedQLinear) -> Tensor:
    """Return the prepared form of the layer's words, or an empty tensor if the layer uses none."""
    form = layer.weight_prepared
    if form is None and layer.weight.numel() > FEW_WORDS:
        form = layer.prepare()
    return _NO_FORM if form is None else form


class Folded:
    """The limits of a chain, and what they were computed from.

    Attributes:
        snapshot: The state of the modules for which the limits are right.
        input_limits: What replaces the modules before the first layer, or the reason why nothing does.
        limits: For each layer except the last, what replaces the modules after it, or the reason why nothing does.
    """

    def __init__(
        self, snapshot: Snapshot, chain: Chain, input_limits: InputLimits | str, limits: list[Limits | str]
    ) -> None:
        """Divide a chain into segments.

        Args:
            snapshot: The state of the modules.
            chain: The chain.
            input_limits: What replaces the modules before its first layer.
            limits: What replaces the modules after each layer.
        """
        self.snapshot, self.input_limits, self.limits = snapshot, input_limits, limits
        self._before, self._layers = chain.before, chain.layers
        self._rows_only = any(map(counts_channels_first, chain.modules))
        self._is_of_use = any(not isinstance(each, str) for each in (input_limits, *limits))
        self._segments: list[Segment] = []
        begin = 0
        for place, outcome in enumerate([*limits, ""]):
            if isinstance(outcome, str):
                inner = [each for each in limits[begin:place] if not isinstance(each, str)]
                toggles = [each.toggles for each in inner] if any(each.toggles.numel() for each in inner) else None
                tables = [each.limits for each in inner], [each.flips for each in inner], toggles
                self._segments.append(Segment(self._layers[begin : place + 1], *tables, chain.between[place]))
                begin = place + 1

    def takes(self, x: Tensor) -> bool:
        """Whether the limits are of use, and right for an input of this shape."""
        shape = x.shape
        if len(shape) != 2 and (self._rows_only or not shape):
            return False
        return self._is_of_use and shape[-1] == self._layers[0].in_features and x.numel() > 0

    def run(self, x: Tensor) -> Tensor:
        """Compute the chain's output."""
        stale = _library.stale_forms
        before, dtype, limits = stale.value, x.dtype, self.input_limits
        # Batch norm takes another code path for strided inputs.
        if isinstance(limits, InputLimits) and x.is_contiguous():
            strict = self._layers[0]._input_rule == STRICT_INPUT
            x = _pack_bits(x, strict, limits=limits.limits, flips=limits.flips)
        else:
            for module in self._before:
                x = module(x)
        for segment in self._segments:
            x = segment.run(x, dtype)
        if stale.value != before:
            for layer in self._layers:
                layer.prepare()  # a form was made from other words; the next call gets the form of these
        return x


def _layer_after(modules: list[nn.Module], place: int) -> int | str:
    """Return the place of the packed layer whose signs need only the order of the values from this place on.

    Returns:
        The place, which is the given one if it is that of a layer, or the reason why there is none.
    """
    for reader in range(place, len(modules)):
        layer = modules[reader]
        if type(layer) is PackedQLinear:
            if layer._input_rule not in SIGN_INPUTS:
                return "its input is not signs"
            if layer._weight_rule == TERNARY_WEIGHT:
                return _TERNARY
            reasons = (reason_against_before(module, layer.in_features) for module in modules[place:reader])
            return next(filter(None, reasons), reader)
    return "no packed layer follows"


def _reader_after(modules: list[nn.Module], place: int) -> int | str:
    """Return the place of the packed layer that takes the signs of this one's outputs, or the reason why none does."""
    layer = modules[place]
    if type(layer) is not PackedQLinear:
        return f"{type(layer).__name__} is not a PackedQLinear"
    if layer._input_rule not in SIGN_INPUTS:
        return "its input is not signs, so its product has other values"
    if layer._weight_rule == TERNARY_WEIGHT:
        return _TERNARY
    for reader in range(place + 1, len(modules)):
        module = modules[reader]
        if type(module) is PackedQLinear:
            if module.in_features != layer.out_features:
                return f"the next layer has {module.in_features} inputs instead of {layer.out_features}"
            if module._weight_rule == TERNARY_WEIGHT:
                return "the next layer's weights are ternary"
            return reader if module._input_rule in SIGN_INPUTS else "the next layer does not read signs"
        if reason := reason_against_between(module, layer.out_features):
            return reason
    return "no packed layer follows in its nn.Sequential"


def _dtype_of(layer: nn.Module) -> torch.dtype:
    """Return the dtype of the inputs that a packed layer was made for."""
    parameter = next(layer.parameters(), None)
    return torch.get_default_dtype() if parameter is None else parameter.dtype


class Snapshot:
    """Everything that the limits of a chain are computed from, to be compared with in each call.

    A ``_C.ModuleState`` compares it in less than half of the time that Python takes. What it does not find to be the
    same, Python compares again, because it may be the same in another way, such as in memory of another address.
    """

    def __init__(self, modules: list[nn.Module], read: list[tuple[nn.Module, str, str]]) -> None:
        """Keep the state of the modules.

        Args:
            modules: The modules of the chain.
            read: The module, table and name of each tensor.
        """
        self._modules = modules
        self._types = [type(module) for module in modules]
        self._classes = list(set(self._types))
        self._forwards = _forwards_of(self._classes)
        self._names = [set(module.__dict__) for module in modules]
        self._attributes = [(module, itemgetter(*_own_attributes(module))) for module in modules]
        self._values = [get(module.__dict__) for module, get in self._attributes]
        self._promising = [module for module in modules if type(module) not in FORWARDS]
        self._strictly = _strictly(self._promising)
        self._read = [each for each in read if getattr(each[0], each[1])[each[2]] is not None]
        self._missing = [each for each in read if getattr(each[0], each[1])[each[2]] is None]
        tensors = self.tensors()
        self._tensor_types = [type(tensor) for tensor in tensors]
        self._record = _record_values(tensors)
        self._state: _State | None = None

    @classmethod
    def of(cls, modules: list[nn.Module]) -> Snapshot | None:
        """Return the state of the modules, or None if a part of it cannot be compared later."""
        if any(_has_own_call(module) or not _is_plain_module(module) for module in modules):
            return None
        if any(type(module).forward is not FORWARDS.get(type(module), type(module).forward) for module in modules):
            return None
        read = [each for module in modules for each in _tensors_of(module)]
        values = [getattr(module, table)[name] for module, table, name in read]
        if any(value is not None and not _is_comparable(value) for value in values):
            return None
        with torch.inference_mode(False), torch.no_grad():
            try:
                return cls(modules, read)
            except RuntimeError:
                return None  # a tensor has less memory than its shape needs

    def tensors(self) -> list[Tensor]:
        """Return the tensors that the modules have now."""
        return [getattr(module, table)[name] for module, table, name in self._read]

    def compare_faster(self) -> None:
        """Let C++ compare from now on, if nothing has changed."""
        if _EXCHANGE is None:
            return
        places = {(id(module), table, name): place for place, (module, table, name) in enumerate(self._read)}
        pinned: list[tuple[object, str, object]] = [
            (nn.Module, name, getattr(nn.Module, name)) for name in MODULE_CALLS
        ]
        pinned += [(cls, "forward", cls.forward) for cls in self._classes]
        modules = [(module, _rules_of(module, places)) for module in self._modules]
        try:
            state = _State(modules, pinned, self.tensors(), self._record)
            # The two agree only if they are of the same state, although another thread may write meanwhile.
            if state.same() and self._is_same():
                self._state = state
        except Exception:
            return  # a tensor that DLPack cannot describe

    def holds(self) -> bool:
        """Whether the modules are in this state."""
        # A mode, such as that of torch.device, sees each method of a tensor that C++ calls, and one operator here.
        state = None if any_function_mode() else self._state
        if state is not None and state.same():
            return True
        if not self._is_same():
            return False
        if state is not None:
            try:
                state.locate(self.tensors())
            except Exception:
                self._state = None
        return True

    def _is_same(self) -> bool:
        """Compare in Python, and the tensors by an operator."""
        modules = self._modules
        if [type(module) for module in modules] != self._types or _forwards_of(self._classes) != self._forwards:
            return False
        # A further name may be `forward`, also if another one is missing.
        if any_hooks(modules) or [module.__dict__.keys() for module in modules] != self._names:
            return False
        try:
            if [get(module.__dict__) for module, get in self._attributes] != self._values:
                return False
            if self._promising and _strictly(self._promising) != self._strictly:
                return False
            if any([getattr(module, table)[name] is not None for module, table, name in self._missing]):
                return False
            tensors = self.tensors()
            return [type(each) for each in tensors] == self._tensor_types and _same_values(tensors, self._record)
        except Exception:
            # An attribute may be missing now, or a value whose comparison raises an error, such as a tensor.
            return False


def _rules_of(module: nn.Module, places: dict[tuple[int, str, str], int]) -> list[tuple[str, int, Any]]:
    """Return by which rule ``_C.ModuleState`` compares each attribute of a module.

    Args:
        module: The module.
        places: The place of each tensor that is compared, by its module's id, its table and its name.
    """
    read = _own_attributes(module).keys()
    rules: list[tuple[str, int, Any]] = []
    for name, value in list(module.__dict__.items()):
        if name in CALL_HOOKS:
            rules.append((name, _EMPTY, None))
        elif name in ("_parameters", "_buffers"):
            inner: list[tuple[str, int, Any]] = []
            for key, tensor in value.items():
                place = places.get((id(module), name, key))
                if place is not None:
                    inner.append((key, _TENSOR, place))
                else:
                    inner.append((key, _SAME if tensor is None else _ANYTHING, None))
            rules.append((name, _TABLE, inner))
        elif name == "_modules":
            rules.append((name, _TABLE, [(key, _ANYTHING, None) for key in value]))
        else:
            rules.append((name, _SAME, value) if name in read else (name, _ANYTHING, None))
    return rules


def _forwards_of(classes: list[type[nn.Module]]) -> list[Any]:
    """Return the functions that a call of a module runs, because someone may replace a class's, too."""
    return [*[getattr(nn.Module, name) for name in MODULE_CALLS], *[cls.forward for cls in classes]]


def _strictly(modules: list[nn.Module]) -> list[Any]:
    """Return what modules of users' classes may read, such that also 0.0 and -0.0, or 1 and True, are unequal."""
    return [
        (
            tuple(module._parameters),
            tuple(module._buffers),
            tuple(module._modules),
            [(type(value), repr(value)) for value in _own_attributes(module).values()],
        )
        for module in modules
    ]


def _is_plain_module(module: nn.Module) -> bool:
    """Whether all that the module's forward may read can be compared."""
    if isinstance(module, PackedQLinear):
        return _is_comparable(module.weight)
    return all(type(value) in _SIMPLE for value in _own_attributes(module).values()) and not module._modules


def _is_comparable(tensor: Tensor) -> bool:
    return is_plain(tensor) and tensor.is_cpu and tensor.is_contiguous()


def _own_attributes(module: nn.Module) -> dict[str, Any]:
    """Return the attributes that a module's forward may read, except tensors and modules."""
    unread = {"weight_prepared"} if isinstance(module, PackedQLinear) else set()
    return {name: value for name, value in module.__dict__.items() if name not in _OF_TORCH and name not in unread}


def _tensors_of(module: nn.Module) -> list[tuple[nn.Module, str, str]]:
    """Return the tables and names of the tensors from which limits are computed."""
    if isinstance(module, PackedQLinear):
        return [(module, "_parameters", "bias"), (module, "_buffers", "scale")]
    unread = {"num_batches_tracked"} if isinstance(module, nn.BatchNorm1d) else set()
    return [
        (module, table, name)
        for table in ("_parameters", "_buffers")
        for name in getattr(module, table)
        if name not in unread
    ]


def fuse_sequentials(model: nn.Module) -> None:
    """Make each ``nn.Sequential`` of a model in which packed layers follow each other a FusedSequential.

    The class of the module is exchanged, so that all references to it, its hooks and its attributes stay.

    Args:
        model: The model, which is changed.
    """
    inside: set[int] = set()
    for module in list(model.modules()):
        if type(module) is not nn.Sequential or "forward" in module.__dict__:
            continue
        if Plan(module).chains:
            module.__class__ = FusedSequential
            # A call of an outer nn.Sequential computes the chains of the inner ones by limits of its own.
            if isinstance(module, FusedSequential) and id(module) not in inside:
                module.fuse()
        inside.update(id(each) for each in _flatten(module) if is_sequential(each))


@dataclass(frozen=True)
class Fusion:
    """What becomes of a packed layer's input and output in an ``nn.Sequential``.

    Attributes:
        input: "limits through" the modules before the layer, or the reason why they are computed.
        output: "words for the next layer", or the reason why the layer writes floats.
    """

    input: str
    output: str


_LIMITS, _WORDS = "limits", "words for the next layer"
_STATE = "a module of the chain has hooks, a forward or attributes of its own, or tensors that are not on the CPU"
_NOW = "no limits can be computed now: under autocast, a mode, a hook for all modules, or flushed subnormal numbers"


def fusions(model: nn.Module) -> dict[int, Fusion]:
    """Return what becomes of the inputs and outputs of packed layers in the model's ``nn.Sequential``, by their ids.

    Args:
        model: Any module. The modules around packed layers are evaluated, as :meth:`FusedSequential.fuse` does.
    """
    found: dict[int, Fusion] = {}
    # The order of the modules is that from the outside to the inside, and the outermost fuses.
    for root in model.modules():
        if type(root) in (nn.Sequential, FusedSequential):
            for key, fusion in _fusions_of(root).items():
                found.setdefault(key, fusion)
    return found


def _fusions_of(root: nn.Module) -> dict[int, Fusion]:
    modules = [module for module in _flatten(root) if not is_sequential(module)]
    found = {}
    for place, layer in enumerate(modules):
        if isinstance(layer, PackedQLinear):
            why = reason_against_before(modules[place - 1], layer.in_features) if place else ""
            found[id(layer)] = Fusion(why, str(_reader_after(modules, place)))
    would = "" if type(root) is FusedSequential else "with pack(model, fuse=True): "

    def report(outcome: object, what: str, through: Iterable[nn.Module]) -> str:
        names = ", ".join(type(module).__name__ for module in through)
        return outcome if isinstance(outcome, str) else would + what + (f" through {names}" if names else "")

    plan = root._current_plan() if isinstance(root, FusedSequential) else Plan(root)
    for chain in plan.chains:
        folded = chain.folded(_dtype_of(chain.layers[0]))
        why = _STATE if folded is None and Snapshot.of(chain.modules) is None else _NOW
        limits = [why] * len(chain.layers[1:]) if folded is None else folded.limits
        for layer, between, outcome in zip(chain.layers, chain.between, limits, strict=False):
            text = report(outcome, _WORDS, between)
            if isinstance(outcome, Limits) and outcome.toggles.numel():
                count = outcome.toggles[0].unique().numel()
                text += f" (the signs of {count} of {layer.out_features} channels change more than once)"
            found[id(layer)] = Fusion(found[id(layer)].input, text)
        for layer in chain.layers[1:]:
            found[id(layer)] = Fusion("", found[id(layer)].output)
        if chain.before:
            first = chain.layers[0]
            text = report(why if folded is None else folded.input_limits, _LIMITS, chain.before)
            found[id(first)] = Fusion(text, found[id(first)].output)
    return found
