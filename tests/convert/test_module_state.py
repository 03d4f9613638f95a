"""ModuleState finds modules to be the same only if nothing that a rule names has changed."""

import collections
import gc
import struct
import subprocess
import sys
import weakref

import pytest
import torch
from torch import nn

from bitorch_qlinear import _C
from bitorch_qlinear.fused import _ANYTHING, _EMPTY, _EXCHANGE, _IS_NEGATIVE, _SAME, _TABLE, _TENSOR, _State

pytestmark = pytest.mark.skipif(_EXCHANGE is None, reason="this torch has no __dlpack_c_exchange_api__")
record_values = torch.ops.bitorch_qlinear.record_values


class Box:
    """Has a __dict__, as a module has."""


class State:
    """A state of one object, and all that it needs to stay alive."""

    def __init__(self, box, rules, tensors=(), pinned=()):
        self.kept = [(box, rules)], list(pinned), list(tensors)
        self.record = record_values(self.kept[2])
        self.state = _C.ModuleState(*self.kept, self.record, _EXCHANGE, _IS_NEGATIVE)

    def same(self):
        return self.state.same()


def box_of(**attributes):
    box = Box()
    box.__dict__.update(attributes)
    return box


VALUES = [0.0, -0.0, 0, False, 1, True, 1.0, "1", None, float("nan"), -float("nan"), float("inf"), 2**70, "", -1]


def bits_of(value):
    return type(value), struct.pack("d", value) if type(value) is float else value


@pytest.mark.parametrize("value", VALUES, ids=str)
def test_values_of_attributes(value):
    box = box_of(value=value)
    state = State(box, [("value", _SAME, value)])
    for other in VALUES:
        box.value = other
        assert state.same() == (bits_of(other) == bits_of(value)), other
    for copied in {float: lambda: struct.unpack("d", struct.pack("d", value))[0], str: lambda: "".join(value)}.items():
        if type(value) is copied[0]:
            box.value = copied[1]()
            assert state.same()


def test_other_objects_are_the_same_only_as_themselves():
    value = [1]
    box = box_of(value=value)
    state = State(box, [("value", _SAME, value)])
    assert state.same()
    box.value = [1]
    assert not state.same()


def test_names_and_their_order():
    box = box_of(a=1, b=2)
    state = State(box, [("a", _ANYTHING, None), ("b", _ANYTHING, None)])
    box.a = "another"
    assert state.same()
    box.c = 3
    assert not state.same()
    del box.c
    assert state.same()
    del box.a
    assert not state.same()
    box.a = 1
    assert not state.same()
    box.__dict__ = {"a": 1, "b": 2}
    assert state.same()


@pytest.mark.parametrize("value", [{"a": 1}, collections.OrderedDict(a=1), None, [], 0])
def test_what_must_be_empty(value):
    box = box_of(hooks={})
    state = State(box, [("hooks", _EMPTY, None)])
    box.hooks = collections.OrderedDict()
    assert state.same()
    box.hooks = value
    assert not state.same()


def test_tables():
    box = box_of(table={"a": 1, "b": None})
    state = State(box, [("table", _TABLE, [("a", _ANYTHING, None), ("b", _SAME, None)])])
    for table, same in (
        ({"a": 2, "b": None}, True),
        ({"a": 2, "b": 1}, False),
        ({"b": None, "a": 2}, False),
        ({"a": 2}, False),
        ({"a": 2, "b": None, "c": 1}, False),
        (collections.OrderedDict(a=2, b=None), False),
        (None, False),
    ):
        box.table = table
        assert state.same() == same, table


def test_another_class():
    box = box_of()
    state = State(box, [])
    assert state.same()
    box.__class__ = type("Other", (Box,), {})
    assert not state.same()


def test_attributes_of_classes():
    def forward():
        """Be a function."""

    owner = type("Owner", (), {"forward": forward})
    state = State(box_of(), [], pinned=[(owner, "forward", forward)])
    assert state.same()
    owner.forward = lambda: None
    assert not state.same()
    del owner.forward
    assert not state.same()


DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (0,), (2, 0), (7,)])
def test_values_of_tensors(dtype, shape):
    """Each of several tensors, whose record fills each of them up to 8 bytes."""
    tensors = [(torch.rand(shape) * 9).to(dtype) for _ in range(3)]
    box = box_of(table=dict(zip("abc", tensors, strict=True)))
    state = State(box, [("table", _TABLE, [(name, _TENSOR, place) for place, name in enumerate("abc")])], tensors)
    assert state.same()
    for tensor in tensors:
        written = tensor.view(-1).view(torch.uint8) if tensor.numel() else tensor[:0]
        for place in range(written.numel()):
            written[place] ^= 1
            assert not state.same()
            written[place] ^= 1
            assert state.same()


TENSOR_CHANGES = {
    "another-address": lambda tensor: tensor.clone(),
    "another-type": lambda tensor: nn.Parameter(tensor),
    "another-dtype": lambda tensor: tensor.view(torch.int32),
    "another-shape": lambda tensor: tensor.view(3, 2),
    "fewer": lambda tensor: tensor[:1],
    "one-dimension": lambda tensor: tensor.view(-1),
    "other-strides": lambda tensor: tensor.as_strided((2, 3), (1, 2)),
    "negative": torch._neg_view,
    "complex": lambda tensor: tensor.to(torch.complex64),
    "sparse": lambda tensor: tensor.to_sparse(),
    "meta": lambda tensor: tensor.to("meta"),
    "zeros": lambda tensor: torch._efficientzerotensor((2, 3), dtype=torch.float32),
    "subclass": lambda tensor: tensor.as_subclass(type("Own", (torch.Tensor,), {})),
    "none": lambda tensor: None,
    "number": lambda tensor: 3,
}


@pytest.mark.parametrize("name", TENSOR_CHANGES)
def test_other_tensors(name):
    tensor = torch.zeros(2, 3)
    box = box_of(tensor=tensor)
    state = State(box, [("tensor", _TENSOR, 0)], [tensor])
    assert state.same()
    box.tensor = TENSOR_CHANGES[name](tensor)
    assert not state.same()
    box.tensor = tensor[:]
    assert state.same()


@pytest.mark.parametrize("size", [0, 4, 400])
def test_a_storage_of_another_size(size):
    tensor = torch.zeros(64)
    state = State(box_of(tensor=tensor), [("tensor", _TENSOR, 0)], [tensor])
    tensor.untyped_storage().resize_(size)
    assert not state.same()


def resize_in_place(tensor, size):
    """Give a tensor's storage another size at its address, if the allocator hands out the same memory again."""
    storage, address = tensor.untyped_storage(), tensor.data_ptr()
    others = []
    for _ in range(100):
        storage.resize_(0)
        storage.resize_(size)
        if storage.data_ptr() == address:
            return True
        others.append(storage.clone())
    return False


def test_a_storage_that_is_too_small_at_its_old_address():
    tensor = torch.zeros(15000)
    state = State(box_of(tensor=tensor), [("tensor", _TENSOR, 0)], [tensor])
    if not resize_in_place(tensor, 59000):
        pytest.skip("the allocator did not hand out the same memory again")
    torch.zeros(0).set_(tensor.untyped_storage())[:].zero_()
    assert not state.same()


@pytest.mark.parametrize("size", [59000, 60000])
def test_another_storage_that_is_too_small(size):
    """The tensor has another storage at the address of its first one."""
    first = torch.zeros(15000)
    box = box_of(tensor=first)
    state = State(box, [("tensor", _TENSOR, 0)], [first])
    address = first.data_ptr()
    first.untyped_storage().resize_(0)
    others = [torch.zeros(15000) for _ in range(100)]
    if first.untyped_storage().resize_(60000).data_ptr() == address:
        pytest.skip("the allocator did not hand out the memory to another tensor")
    other = next((each for each in others if each.data_ptr() == address), None)
    if other is None or not (size == 60000 or resize_in_place(other, size)):
        pytest.skip("the allocator did not hand out the same memory again")
    box.tensor = other
    assert not state.same()


def test_tensors_that_are_not_contiguous():
    record = record_values([torch.zeros(64)])
    with pytest.raises(RuntimeError, match="contiguous"):
        _C.ModuleState([], [], [torch.zeros(1).expand(64)], record, _EXCHANGE, _IS_NEGATIVE)
    tensor = torch.zeros(64)
    state = State(box_of(tensor=tensor), [("tensor", _TENSOR, 0)], [tensor])
    with pytest.raises(RuntimeError, match="contiguous"):
        state.state.locate([torch.zeros(1).expand(64)])


def test_tensors_beyond_their_storages():
    tensor, record = torch.zeros(64), record_values([torch.zeros(64)])
    tensor.untyped_storage().resize_(100)
    with pytest.raises(RuntimeError, match="inside their storages"):
        _C.ModuleState([], [], [tensor], record, _EXCHANGE, _IS_NEGATIVE)


@pytest.mark.parametrize("recorded", [[], [(7,)], [(3, 2)], [(2, 3), (1,)], [(1,), (2, 3)]], ids=str)
def test_tensors_that_are_not_those_of_the_record(recorded):
    tensors = [torch.zeros(2, 3), torch.zeros(5)]
    record = record_values([torch.zeros(shape) for shape in recorded])
    with pytest.raises(RuntimeError, match="those of the record"):
        _C.ModuleState([], [], tensors, record, _EXCHANGE, _IS_NEGATIVE)


def test_tensors_that_have_moved():
    tensor = torch.arange(6.0)
    box = box_of(tensor=tensor)
    state = State(box, [("tensor", _TENSOR, 0)], [tensor])
    box.tensor = moved = tensor.clone()
    assert not state.same()
    state.state.locate([moved])
    assert state.same()
    moved[5] = 7
    assert not state.same()
    # A tensor of another form is not taken, whose values do not fill the record.
    for other in (torch.zeros(7), torch.zeros(6).int(), torch.zeros(2, 3)):
        box.tensor = other
        state.state.locate([other])
        assert not state.same()
    with pytest.raises(ValueError, match="as many as before"):
        state.state.locate([])


def test_a_thread_that_flushes_subnormal_numbers():
    tensor = torch.zeros(3)
    state = State(box_of(tensor=tensor), [("tensor", _TENSOR, 0)], [tensor])
    assert torch.set_flush_denormal(True)
    try:
        assert not state.same()
    finally:
        torch.set_flush_denormal(False)
    assert state.same()


@pytest.mark.parametrize("tensor", [torch.zeros(2, dtype=torch.complex64), torch.zeros(2).to("meta")])
def test_tensors_that_are_not_compared(tensor):
    with pytest.raises(RuntimeError):
        _C.ModuleState([], [], [tensor], record_values([]), _EXCHANGE, _IS_NEGATIVE)


def test_arguments_that_do_not_fit():
    with pytest.raises(RuntimeError, match="exchange: expected DLPack"):
        _C.ModuleState([], [], [torch.zeros(2)], record_values([torch.zeros(2)]), None, _IS_NEGATIVE)
    with pytest.raises(ValueError, match="PyCapsule"):
        _C.ModuleState([], [], [torch.zeros(2)], record_values([torch.zeros(2)]), 3, _IS_NEGATIVE)
    with pytest.raises(IndexError, match="no such tensor"):
        _C.ModuleState([(box_of(a=1), [("a", _TENSOR, 0)])], [], [], None, _EXCHANGE, _IS_NEGATIVE)


def test_what_a_state_points_to_stays_alive():
    """Another thread may have replaced the state while one compares with it."""
    module, owner, tensor = nn.Identity(), type("Owner", (), {"forward": len}), torch.zeros(3)
    module.value, module.tensor = nn.Identity(), tensor
    rules = [(name, _ANYTHING, None) for name in module.__dict__ if name != "_modules"]
    rules.insert(list(module.__dict__).index("_modules"), ("_modules", _TABLE, [("value", _SAME, module.value)]))
    record = record_values([tensor])
    alive = [weakref.ref(each) for each in (module, owner, module.value, record)]
    state = _State([(module, rules)], [(owner, "forward", len)], [tensor], record)
    assert state.same()
    module.__dict__["_modules"].clear()
    del module, owner, rules, record
    gc.collect()
    assert all(each() is not None for each in alive)
    del state
    gc.collect()
    assert all(each() is None for each in alive)


EXCHANGING = """
import sys, threading
import torch
from bitorch_qlinear import _C
from bitorch_qlinear.fused import _EXCHANGE, _IS_NEGATIVE, _TABLE, _TENSOR

class Box: pass

sys.setswitchinterval(1e-6)
tensors = {str(i): torch.full((3,), float(i)) for i in range(12)}
box = Box()
box.table = dict(tensors)
record = torch.ops.bitorch_qlinear.record_values(list(tensors.values()))
modules = [(box, [("table", _TABLE, [(name, _TENSOR, place) for place, name in enumerate(tensors)])])]
state = _C.ModuleState(modules, [], list(tensors.values()), record, _EXCHANGE, _IS_NEGATIVE)
ended = False

def exchange():
    while not ended:
        box.table = {name: tensor[:] for name, tensor in tensors.items()}
        for name, tensor in tensors.items():
            box.table[name] = tensor[:]

threads = [threading.Thread(target=exchange) for _ in range(2)]
for thread in threads:
    thread.start()
found = {state.same() for _ in range(20000)}
ended = True
for thread in threads:
    thread.join()
assert found == {True}
"""


def test_tables_and_tensors_that_other_threads_exchange():
    """A process of its own, because a comparison that keeps no reference ends it."""
    subprocess.run([sys.executable, "-c", EXCHANGING], check=True)
