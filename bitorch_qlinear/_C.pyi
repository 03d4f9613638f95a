from typing import Any

from torch import Tensor

def build_info() -> dict[str, str]: ...
def cpu_capability() -> str: ...

class ModuleState:
    def __init__(
        self,
        modules: list[Any],
        pinned: list[tuple[object, str, object]],
        tensors: list[Tensor],
        record: Tensor,
        exchange: object,
        is_negative: object,
    ) -> None: ...
    def same(self) -> bool: ...
    def locate(self, tensors: list[Tensor]) -> None: ...
