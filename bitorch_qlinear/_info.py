"""A description of this installation, of the machine, and of the kernels that compute on it."""

from __future__ import annotations

import dataclasses
import textwrap

import torch

from . import _C, _kernels, _library
from ._version import __version__

__all__ = ["Info", "info"]


@dataclasses.dataclass(frozen=True)
class Info:
    """An installation and the machine that it runs on; ``str`` gives an aligned list of the fields.

    Attributes:
        version: Version of bitorch_qlinear.
        compiler: Name and version of the C++ compiler.
        torch_built: Version of torch that the package was compiled against.
        torch_running: Version of torch in this process.
        cuda: Targets that the CUDA operators were compiled for, or the reason why there are no CUDA operators.
        cuda_devices: One text for each CUDA device: its name, compute capability and kernels, and which of them
            computes some example products and why. Empty without CUDA operators.
        cuda_kernel: The forced CUDA kernel, "chosen by each product's sizes", or "none" without CUDA operators.
        cpu_capability: Best instruction set of processor and operating system: "AVX512", "AVX2", "NEON" or "DEFAULT".
        kernels: The CPU kernels that this processor can run, best first.
        kernel: The CPU kernel that computes.
        kernel_reason: The reason why this CPU kernel computes.
    """

    version: str
    compiler: str
    torch_built: str
    torch_running: str
    cuda: str
    cuda_devices: tuple[str, ...]
    cuda_kernel: str
    cpu_capability: str
    kernels: tuple[str, ...]
    kernel: str
    kernel_reason: str

    def __str__(self) -> str:
        """Return the fields as an aligned list; a long value continues below its beginning."""
        names = [field.name for field in dataclasses.fields(self)]
        width = max(map(len, names)) + 2
        lines: list[str] = []
        for name in names:
            label = name.replace("_", " ")
            for text in self._texts(name):
                lines += textwrap.wrap(
                    text,
                    width=100,
                    initial_indent=f"{label:<{width}}",
                    subsequent_indent=" " * width,
                    break_long_words=False,
                    break_on_hyphens=False,
                )
                label = ""
        return "\n".join(lines)

    def _texts(self, name: str) -> list[str]:
        """Return the paragraphs of a field: one for each device, and a single one for every other field."""
        value: str | tuple[str, ...] = getattr(self, name)
        if isinstance(value, str):
            return [value]
        return list(value or ["none"]) if name == "cuda_devices" else [", ".join(value)]


def info() -> Info:
    """Describe the installation and the machine: versions, compiler, CUDA, processor, and the kernels that compute.

    Returns:
        The state at this moment; a kernel that is forced later is not in it.
    """
    build = _library.build_info
    return Info(
        version=__version__,
        compiler=build["compiler"],
        torch_built=build["torch"],
        torch_running=torch.__version__,
        cuda=_library.no_cuda_reason or build["cuda_targets"],
        cuda_devices=_cuda_devices(),
        cuda_kernel=(_kernels.forced_cuda_kernel() or "chosen by each product's sizes")
        if _library.has_cuda
        else "none",
        cpu_capability=_C.cpu_capability(),
        kernels=tuple(_kernels.available_kernels()),
        kernel=_kernels.active_kernel(),
        kernel_reason=_kernels.active_kernel_reason(),
    )


def _cuda_devices() -> tuple[str, ...]:
    if not _library.has_cuda:
        return ()
    return tuple(_cuda_device(index) for index in range(torch.cuda.device_count()))


def _cuda_device(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    capability = properties.major, properties.minor
    code = _kernels.cuda_code(index)
    kernels = ", ".join(_kernels.available_cuda_kernels(capability, code))
    device = f"{properties.name}, compute capability {properties.major}.{properties.minor}"
    if not kernels:
        return f"{device}: no kernel, 7.5 or later is needed"
    choices = "; ".join(
        f"{rows} × 4096 → 4096 in bfloat16: "
        + _kernels.cuda_choice(capability, properties.multi_processor_count, rows, 4096, 4096, 2, code)
        for rows in (1, 16, 4096)
    )
    return f"{device}: {kernels}; {choices}"
