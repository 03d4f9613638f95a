"""Set up what a make target needs: the virtual environment, torch, other packages and the compiled extension.

The Makefile runs this with the Python that it was told to use, for example::

    python3 tools/environment.py --venv .venv --torch torch==2.13.0 test

Each step leaves a record of what it was made from. A step runs again if its record differs from today's, so a call that
has nothing to do takes a tenth of a second. Records hold contents, not times, because a copy may bring sources that are
different and older. Only the standard library is imported, because nothing else is installed yet.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[1]
# The extras of pyproject.toml that a target needs. A target that is not listed needs those of the tests.
EXTRAS = {"build": ("lint", "test"), "check": ("lint", "test"), "demo": ("demo",), "docs": ("docs",), "lint": ("lint",)}
# torch warns at import if numpy is missing, and the tests need it anyway.
BUILD_TOOLS = ("setuptools", "ninja", "pybind11")
# These files decide what an installation of the package contains.
METADATA = ("setup.py", "pyproject.toml", "bitorch_qlinear/_version.py")


def fail(sentence: str) -> NoReturn:
    """End the program with one sentence, as make reports its own errors."""
    raise SystemExit(f"make: {sentence}")


@dataclass(frozen=True)
class Environment:
    """A virtual environment and the compiled extension of one checkout.

    Attributes:
        torch: The requirement that pip installs, such as "torch==2.13.0".
        index: The address of the package index that torch comes from; "" means pip's own choice.
        system: Whether to use the torch and the packages that the running Python has, instead of installing them.
        venv: The folder of the virtual environment, relative to the root.
        python: The running Python as the caller named it, for messages.
        root: The checkout.
        variables: The environment variables, some of which choose a compiler and the CUDA targets.
    """

    torch: str
    index: str = ""
    system: bool = False
    venv: str = ".venv"
    python: str = "python3"
    root: Path = ROOT
    variables: dict[str, str] = field(default_factory=lambda: dict(os.environ))

    # ---- Records ---------------------------------------------------------------------------------------------------

    @property
    def folder(self) -> Path:
        """The folder of the virtual environment."""
        return self.root / self.venv

    @property
    def interpreter(self) -> str:
        """The Python of the virtual environment, relative to the root."""
        return f"{self.venv}/bin/python"

    def venv_record(self) -> str:
        """Return what the virtual environment is made from: a Python and a torch.

        The Python is identified by its base, so that an activated .venv counts as the Python that it was made from.
        """
        version = ".".join(str(part) for part in sys.version_info[:3])
        if self.system:
            return f"{sys.base_prefix} {version} system torch {importlib.metadata.version('torch')}"
        return f"{sys.base_prefix} {version} {self.torch} {self.index}".strip()

    def build_record(self) -> str:
        """Return what the compiled extension is made from.

        The record names the environment, because several environments share the libraries of a checkout. It also holds
        the time at which its torch was installed, because that torch may have come from another index.
        """
        digest = runpy.run_path(str(self.root / "bitorch_qlinear" / "_sources.py"))["digest"](self.root)
        chosen = self.variables.get
        parts = [
            *(self.venv, self.venv_record(), read(self.folder / "tools")),
            f"CUDA={chosen('BITORCH_QLINEAR_BUILD_CUDA', '')} CXX={chosen('CXX', '')}",
            f"for {chosen('TORCH_CUDA_ARCH_LIST')}" if chosen("TORCH_CUDA_ARCH_LIST") else "",
            *(digest, self.metadata_digest()),
        ]
        return " ".join(filter(None, parts))

    def metadata_digest(self) -> str:
        """Return a digest of the files that decide what an installation contains."""
        contents = (hashlib.sha256((self.root / name).read_bytes()).digest() for name in METADATA)
        return hashlib.sha256(b"".join(contents)).hexdigest()

    def has_venv(self) -> bool:
        """Return whether the virtual environment was made from today's Python and torch."""
        return read(self.folder / "config") == self.venv_record()

    def has_tools(self) -> bool:
        """Return whether torch and the tools that compile against it are installed."""
        return self.has_venv() and (self.folder / "tools").exists()

    def is_compiled(self) -> bool:
        """Return whether the libraries in the package are this environment's build of today's sources.

        setup.py writes the record at each build, whoever calls it, so a build without make is noticed, too.
        """
        library = self.root / "bitorch_qlinear" / "_ops_cpu.so"
        return self.has_tools() and library.exists() and read(self.root / "build" / "built-by") == self.build_record()

    def installed_extras(self) -> set[str]:
        """Return the extras whose packages are installed for today's pyproject.toml; "" means the package itself."""
        try:
            record = json.loads(read(self.folder / "installed"))
        except ValueError:
            return set()
        return set(record["extras"]) if record["metadata"] == self.metadata_digest() else set()

    # ---- Steps -----------------------------------------------------------------------------------------------------

    def set_up(self, extras: Iterable[str]) -> None:
        """Make everything that is missing or out of date.

        Args:
            extras: The extras of pyproject.toml to install. Those that are installed already stay.

        Raises:
            SystemExit: Something is missing or a step failed; the message says what to do.
        """
        self.set_up_tools()
        if not self.is_compiled():
            self.compile()
        installed = self.installed_extras()
        if not {"", *extras} <= installed:
            self.install({"", *extras, *installed})

    def set_up_tools(self) -> None:
        """Make the virtual environment with torch and the tools that compile against it, if it is out of date."""
        if self.variables.get("BITORCH_QLINEAR_CUDA"):
            fail("BITORCH_QLINEAR_CUDA is now named BITORCH_QLINEAR_BUILD_CUDA: set that one instead")
        # What is missing is reported now, not after the download of torch.
        if self.system:
            self.check_system_torch()
        if not self.has_venv():
            self.check_venv_module()
            self.check_compiler()
            if not self.system:
                self.check_torch_requirement()
            print(f"make: new {self.venv} for {self.venv_record()}", flush=True)
            self.make_venv()
        if not self.has_tools():
            self.install_tools()

    def check_system_torch(self) -> None:
        """End with a message if the torch of SYSTEM_TORCH=1 does not import; only a new .venv makes this test."""
        try:
            if self.has_venv():
                return
        except importlib.metadata.PackageNotFoundError:
            pass
        result = subprocess.run([sys.executable, "-c", "import torch"], capture_output=True, text=True)
        if result.returncode:
            fail(
                f"SYSTEM_TORCH=1 takes the torch of '{self.python}', which does not import "
                f"({result.stderr.strip().splitlines()[-1]}): name another PYTHON, or leave SYSTEM_TORCH out."
            )

    def check_venv_module(self) -> None:
        """End with a message if Python cannot make virtual environments, as on Debian without python3-venv."""
        needed = ["venv"] if self.system else ["venv", "ensurepip"]
        if not all(importlib.util.find_spec(name) for name in needed):
            fail(f"'{self.python}' has no venv module: install it (Debian, Ubuntu: apt install python3-venv).")

    def check_compiler(self) -> None:
        """End with a message if the C++ compiler that setup.py would take does not exist."""
        chosen, path = self.variables.get("CXX", ""), self.variables.get("PATH")
        if not any(shutil.which(name, path=path) for name in shlex.split(chosen)[:1] or ("c++", "g++", "clang++")):
            fail(
                f"there is no C++ compiler '{chosen or 'c++'}': install one (Debian, Ubuntu: apt install g++) "
                "or name it in CXX."
            )

    def check_torch_requirement(self) -> None:
        """Keep the virtual environment that exists if the torch that was asked for cannot be installed."""
        if not (self.root / self.interpreter).exists():
            return
        command = [*self.pip("--quiet", "--dry-run", "--no-deps", "--ignore-installed"), *self.torch_arguments()]
        if subprocess.run(command, cwd=self.root, env=self.variables, stdout=subprocess.DEVNULL).returncode:
            fail(f"pip finds no '{self.torch}': {self.venv} stays as it is.")

    def make_venv(self) -> None:
        """Make the virtual environment; what the folder held is lost."""
        if not self.system:
            self.run([sys.executable, "-m", "venv", "--clear", self.venv], quiet=True)
        else:
            options = ["--clear", "--system-site-packages", "--without-pip"]
            self.run([sys.executable, "-m", "venv", *options, self.venv], quiet=True)
            # The running Python may be one of a virtual environment, whose packages --system-site-packages leaves out.
            # A path file includes them.
            paths = subprocess.run(
                [self.interpreter, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
                cwd=self.root,
                check=True,
                capture_output=True,
                text=True,
            )
            Path(self.root, paths.stdout.strip(), "system.pth").write_text("\n".join(site_folders()) + "\n")
        (self.folder / "config").write_text(self.venv_record() + "\n")

    def install_tools(self) -> None:
        """Install torch and the tools that compile against it.

        torch comes first, in a step of its own, because its download is the long one and the build compiles against it.
        """
        if self.system:
            self.run([*self.pip("--retries", "0"), *BUILD_TOOLS])
        else:
            self.run([*self.pip(), *self.torch_arguments()])
            self.run([*self.pip("--upgrade"), *BUILD_TOOLS, "numpy"])
        (self.folder / "tools").write_text(f"{time.time_ns()}\n")

    def compile(self) -> None:
        """Compile the extension.

        This runs setup.py and not pip, because pip hides the warnings of the compiler and the line about CUDA. An edit
        during the build is not lost, because the record holds the digest of the sources before the build.
        """
        variables = {**self.variables, "BITORCH_QLINEAR_BUILT_BY": self.build_record()}
        command = [self.interpreter, "setup.py", "-q", "build_ext", "--inplace"]
        print(shlex.join(command), flush=True)
        with subprocess.Popen(
            command, cwd=self.root, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process:
            assert process.stdout is not None
            for line in shorten(process.stdout):
                print(line, end="", flush=True)
        if process.returncode:
            raise SystemExit(process.returncode)

    def install(self, extras: set[str]) -> None:
        """Install the package as an editable one, with the packages of some extras.

        Args:
            extras: All extras that the environment has afterwards, and "" for the package itself.
        """
        (self.folder / "installed").unlink(missing_ok=True)
        named = sorted(extras - {""})
        # pip builds the package once more; the build finds nothing to compile, and leaves the same record.
        variables = {**self.variables, "BITORCH_QLINEAR_BUILT_BY": self.build_record()}
        if self.system:
            self.run([*self.pip("--no-deps", "--no-build-isolation"), "-e", "."], variables)
            program = str(Path(__file__).resolve())
            self.run([self.interpreter, program, "--python", self.python, "missing", *named], quiet=True)
        else:
            self.run([*self.pip("--no-build-isolation"), "-e", f".[{','.join(named)}]" if named else "."], variables)
        record = {"metadata": self.metadata_digest(), "extras": sorted(extras)}
        (self.folder / "installed").write_text(json.dumps(record) + "\n")

    # ---- Commands --------------------------------------------------------------------------------------------------

    def pip(self, *options: str) -> list[str]:
        """Return the beginning of an installing command."""
        return [self.interpreter, "-m", "pip", "--disable-pip-version-check", "install", *options]

    def torch_arguments(self) -> list[str]:
        """Return the arguments of pip that name torch and where it comes from."""
        return [*(["--index-url", self.index] if self.index else []), self.torch]

    def run(self, command: Sequence[str], variables: dict[str, str] | None = None, quiet: bool = False) -> None:
        """Run a command in the checkout and end the program with its exit code if it fails.

        Args:
            command: The program and its arguments.
            variables: Its environment variables, if they are not those of this environment.
            quiet: Do not print the command first.
        """
        if not quiet:
            print(shlex.join(command), flush=True)
        code = subprocess.run(command, cwd=self.root, env=variables or self.variables).returncode
        if code:
            raise SystemExit(code)

    def for_gpu(self) -> Environment:
        """Return the environment whose extension is compiled only for the GPUs of this machine.

        That takes a seventh of the time that all targets take. The record of the build names the GPUs, so the next
        target of make compiles for all again. Without a GPU the usual build is made, so that its errors are known.

        Raises:
            SystemExit: torch finds no GPU; the message says why nothing can run.
        """
        self.set_up_tools()
        targets = self.ask(GPU_TARGETS, "torch does not import.")
        if not targets:
            self.set_up(("test",))
            why = self.ask("from bitorch_qlinear import _library; print(_library.no_cuda_reason)", "the build is bad.")
            if why:
                fail(f"nothing was run: there are no CUDA operators, because {why}.")
            fail("nothing was run: everything is built, and torch finds no NVIDIA GPU here.")
        variables = {**self.variables, "BITORCH_QLINEAR_BUILD_CUDA": "1", "TORCH_CUDA_ARCH_LIST": targets}
        return Environment(self.torch, self.index, self.system, self.venv, self.python, self.root, variables)

    def ask(self, program: str, failure: str) -> str:
        """Return what a program prints in the virtual environment; end with a message if it fails."""
        command = [self.interpreter, "-c", program]
        result = subprocess.run(command, cwd=self.root, env=self.variables, stdout=subprocess.PIPE, text=True)
        if result.returncode:
            fail(failure)
        return result.stdout.strip()


# TORCH_CUDA_ARCH_LIST takes these names. Only the "a" of 9.0a allows the instructions that Hopper alone has.
GPU_TARGETS = """
import torch
devices = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
found = {torch.cuda.get_device_capability(device) for device in devices}
print(" ".join(f"{major}.{minor}" + "a" * (major == 9) for major, minor in sorted(found)))
"""


def read(path: Path) -> str:
    """Return a record without the spaces around it, or "" if it does not exist."""
    return path.read_text().strip() if path.exists() else ""


def site_folders() -> list[str]:
    """Return the folders in which the running Python has its packages."""
    import sysconfig

    return [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]


def shorten(lines: Iterable[str]) -> Iterator[str]:
    """Shorten the command lines of a build by ninja; everything else, such as a warning, stays.

    A command that fails is repeated in full by ninja, behind a line that begins with FAILED.

    Args:
        lines: The lines of the build, such as "[3/14] c++ -O3 ... -c csrc/torch/ops.cpp -o ops.o".

    Yields:
        The lines to print, such as "[3/14] csrc/torch/ops.cpp".
    """
    for line in lines:
        found = re.match(r"(\[\d+/\d+\]) .* -c (\S+)", line)
        yield f"{found[1]} {os.path.relpath(found[2])}\n" if found else line


# ---- Packages that a system's Python lacks -------------------------------------------------------------------------


def missing_packages(
    requirements: Iterable[str], have: Iterable[str], extras: Iterable[str]
) -> tuple[list[str], list[str]]:
    """Find the packages that the requirements of this package name and that are not installed.

    Args:
        requirements: Requirements as in the metadata of a package, such as 'numpy; extra == "test"'.
        have: The names of the installed packages.
        extras: The extras that are needed. An extra may include another: 'bitorch_qlinear[demo]; extra == "test"'.

    Returns:
        The missing packages that this package needs itself, and those that the extras need.
    """
    wanted: set[str] = set(extras)
    parsed: list[tuple[str, str | None, str | None]] = []
    for requirement in requirements:
        named = re.match(r"([\w.-]+)(?:\[([\w, -]+)\])?", requirement)
        extra = re.search(r"extra == ['\"]([\w-]+)['\"]", requirement)
        if named:
            parsed.append((named[1], named[2], extra[1] if extra else None))
    for _ in parsed:  # an extra may include one that includes another
        for _, included, extra_name in parsed:
            if included and extra_name in wanted:
                wanted |= {each.strip() for each in included.split(",")}
    known = {normalise(name) for name in have}
    missing = {(name, extra) for name, _, extra in parsed if normalise(name) not in known}
    needed = {name for name, extra in missing if extra is None}
    return sorted(needed), sorted({name for name, extra in missing if extra in wanted} - needed)


def normalise(name: str) -> str:
    """Return the form of a package's name in which two spellings of it are equal."""
    return re.sub(r"[-_.]+", "-", name).lower()


def report_missing(python: str, extras: Sequence[str]) -> None:
    """Print the packages that are missing in the running environment.

    Raises:
        SystemExit: One of them is needed by the package itself.
    """
    have = [distribution.name for distribution in importlib.metadata.distributions()]
    needed, optional = missing_packages(importlib.metadata.requires("bitorch_qlinear") or [], have, extras)
    if needed:
        fail(f"the package needs {', '.join(needed)}: install it for '{python}', or leave SYSTEM_TORCH out.")
    if optional:
        print(f"make: going on without {', '.join(optional)} (not installed; some targets and tests need them)")


def parallel_options() -> list[str]:
    """Return the options of pytest for a parallel run, if the running environment has the plugin."""
    return ["-n", "auto"] if importlib.util.find_spec("xdist") else []


def pytest_options(arguments: Sequence[str]) -> list[str]:
    """Return the options of pytest for a parallel run with coverage, as far as the running environment has plugins.

    A selection of tests covers less: only the whole run must reach the coverage that pyproject.toml asks for.

    Args:
        arguments: The arguments that select tests; empty for the whole run.
    """
    options = parallel_options()
    if importlib.util.find_spec("pytest_cov"):
        options += ["--cov", "--cov-fail-under=0"] if arguments else ["--cov"]
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="tools/environment.py", description="Set up what a make target needs.")
    parser.add_argument("--python", default=sys.executable, help="how messages name this Python")
    parser.add_argument("--venv", default=".venv", help="the folder of the virtual environment")
    parser.add_argument("--torch", default="torch", help="the torch that pip installs")
    parser.add_argument("--index", default="", help="the package index that torch comes from")
    parser.add_argument("--system-torch", default="", help="1: use the torch and the packages of this Python")
    parser.add_argument("target", help="a target of the Makefile; also missing, parallel-options and pytest-options")
    parser.add_argument("arguments", nargs="*", help="extras for missing; arguments of pytest for pytest-options")
    options = parser.parse_args(arguments)
    if options.target == "missing":
        return report_missing(options.python, options.arguments)
    if options.target == "parallel-options":
        return print(shlex.join(parallel_options()))
    if options.target == "pytest-options":
        return print(shlex.join(pytest_options(options.arguments)))
    system = options.system_torch not in ("", "0")
    environment = Environment(options.torch, options.index, system, options.venv, options.python)
    if options.target != "gpu":
        extras = EXTRAS.get(options.target, ("test",))
        # The PTX interpreter is compared with NVIDIA's headers only if CUDA is asked for: they bring 100 MB along.
        if "test" in extras and environment.variables.get("BITORCH_QLINEAR_BUILD_CUDA") == "1":
            extras = (*extras, "vendor")
        return environment.set_up(extras)
    start = time.time()
    environment = environment.for_gpu()
    environment.set_up(("test",))
    targets = environment.variables["TORCH_CUDA_ARCH_LIST"]
    print(f"make: set up and built for compute capability {targets} in {time.time() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
