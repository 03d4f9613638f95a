"""A recorder of the calls of this package's operators."""

from torch.utils._python_dispatch import TorchDispatchMode


class Calls(TorchDispatchMode):
    """Record in ``names``, in order, which of this package's operators are called inside the context."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "bitorch_qlinear":
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))
