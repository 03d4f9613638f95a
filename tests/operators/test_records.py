"""record_values and same_values: a record holds for equal tensors, and reads nothing outside of them."""

import pytest
import torch
from support.operators import resized, shortened


def records(*tensors):
    return torch.ops.bitorch_qlinear.record_values(list(tensors))


def same(record, *tensors):
    return torch.ops.bitorch_qlinear.same_values(list(tensors), record)


def test_records():
    a, b = torch.randn(3, 5), torch.arange(7, dtype=torch.int16)
    record = records(a, b, torch.empty(0))
    assert same(record, a.clone(), b.clone(), torch.empty(0))
    for others in (
        (a, b),
        (a, b, torch.empty(0), torch.empty(0)),
        (b, a, torch.empty(0)),
        (a.view(5, 3), b, torch.empty(0)),
        (a.view(torch.int32), b, torch.empty(0)),
        (a, b.view(torch.float16), torch.empty(0)),
        (a, b, torch.empty(0, 1)),
        (a.t().contiguous().t(), b, torch.empty(0)),
        (a.to("meta"), b, torch.empty(0)),
        (-a, b, torch.empty(0)),
        (),
    ):
        assert not same(record, *others)
    for index in range(7):
        changed = b.clone()
        changed[index] ^= 256
        assert not same(record, a, changed, torch.empty(0))
    nan = torch.tensor([float("nan"), -0.0])
    assert same(records(nan), nan.clone())
    assert not same(records(nan), nan.abs())
    for size in range(record.numel()):
        assert not same(record[:size].clone(), a, b, torch.empty(0))
    assert same(records())


@pytest.mark.parametrize("record", [torch.zeros(3), torch.zeros(2, 2, dtype=torch.uint8)])
def test_what_is_no_record(record):
    with pytest.raises(RuntimeError, match="record: expected a result of record_values"):
        same(record, torch.zeros(2))


def test_what_cannot_be_recorded():
    with pytest.raises(RuntimeError, match="tensors: expected contiguous tensors on the CPU"):
        records(torch.zeros(3, 2).t())


@pytest.mark.parametrize("without", [resized, shortened])
def test_memory_that_is_gone(without):
    whole = torch.arange(100.0)
    with pytest.raises(RuntimeError, match="tensors: expected contiguous tensors on the CPU"):
        records(whole, without(whole))
    assert not same(records(whole), without(whole))
    record = records(whole)
    with pytest.raises(RuntimeError, match="record: expected"):
        same(without(record), whole)


def test_tensors_that_are_not_strided():
    whole = torch.arange(4.0)
    for other in (whole.to_sparse(), torch._efficientzerotensor((4,), dtype=torch.float32), torch._neg_view(-whole)):
        try:
            assert same(records(whole), other) == (other.layout is torch.strided and torch.equal(other, whole))
        except RuntimeError:
            assert other.layout is not torch.strided
