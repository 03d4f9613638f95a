"""The build: shared objects, the choice of a kernel, stale builds, setup.py, sdist."""

import dataclasses
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

import bitorch_qlinear
from bitorch_qlinear import _C, _kernels, _library, _sources

PACKAGE = Path(bitorch_qlinear.__file__).parent
ROOT = PACKAGE.parent
CHECKOUT = Path(__file__).parents[2]
OPERATOR_LIBRARIES = sorted(PACKAGE.glob("_ops_*.so"))


def run_python(code, cwd=ROOT, **environment):
    """Run the code in a new process and return the completed process with its output."""
    removed = ("BITORCH_QLINEAR_CPU_KERNEL", "PYTHONPATH")
    variables = {name: value for name, value in os.environ.items() if name not in removed}
    return subprocess.run(
        [sys.executable, "-c", code], env=variables | environment, cwd=cwd, capture_output=True, text=True, timeout=120
    )


def last_line(result):
    return (result.stdout + result.stderr).strip().splitlines()[-1]


# ---- the shared objects ----------------------------------------------------------------------------


def test_operator_library_is_built():
    assert PACKAGE / "_ops_cpu.so" in OPERATOR_LIBRARIES


@pytest.mark.parametrize("library", OPERATOR_LIBRARIES, ids=lambda path: path.name)
def test_operators_do_not_depend_on_python(library):
    assert shutil.which("nm") and shutil.which("objdump"), "binutils are missing: this property cannot be tested"
    output = subprocess.run(
        ["nm", "-D", "--undefined-only", library], check=True, capture_output=True, text=True
    ).stdout
    symbols = [line.split()[-1] for line in output.splitlines()]
    assert any(symbol.startswith("aoti_torch_") for symbol in symbols), "nm's output was not understood"
    assert not [symbol for symbol in symbols if re.match(r"_?Py|THP", symbol) or "pybind11" in symbol]
    # Only torch's C functions are stable, so no C++ name from at::, c10:: or torch:: may be imported.
    assert not [symbol for symbol in symbols if re.match(r"_ZNK?S?t?(2at|3c10|5torch)", symbol)]
    headers = subprocess.run(["objdump", "-p", library], check=True, capture_output=True, text=True).stdout
    needed = re.findall(r"NEEDED\s+(\S+)", headers)
    assert needed and not [name for name in needed if "python" in name], needed


def test_the_sources_use_no_macro_that_supported_torches_lack():
    """The sources use TORCH_ERROR_CODE_CHECK, which all supported versions have, and not its later replacement."""
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cpp", ".cu", ".cuh")]
    assert any("TORCH_ERROR_CODE_CHECK" in path.read_text() for path in sources)
    assert not [path for path in sources if "STABLE_TORCH_ERROR_CODE_CHECK" in path.read_text()]


def test_operators_need_only_torch():
    result = run_python(
        f"import sys, torch\n"
        f"torch.ops.load_library({str(PACKAGE / '_ops_cpu.so')!r})\n"
        f"words = torch.ops.bitorch_qlinear.pack_bits(torch.tensor([[1.0, -1.0, 0.0]]))\n"
        f"y = torch.ops.bitorch_qlinear.linear(torch.ones(2, 3), words, 3)\n"
        f"print(words.tolist(), y.tolist(), any(name.startswith('bitorch_qlinear') for name in sys.modules))",
        cwd="/",
    )
    assert last_line(result) == "[[5]] [[1.0], [1.0]] False"


def test_info():
    info = bitorch_qlinear.info()
    assert [field.name for field in dataclasses.fields(info)] == [
        "version",
        "compiler",
        "torch_built",
        "torch_running",
        "cuda",
        "cuda_devices",
        "cuda_kernel",
        "cpu_capability",
        "kernels",
        "kernel",
        "kernel_reason",
    ]
    assert info.version == bitorch_qlinear.__version__ == _C.build_info()["version"]
    assert info.torch_running == torch.__version__
    assert info.torch_built == _C.build_info()["torch"]
    assert re.match(r"(gcc|clang) \d", info.compiler)
    assert info.cpu_capability == _C.cpu_capability() in ("AVX512", "AVX2", "NEON", "DEFAULT")
    assert ("avx2" in info.kernels) == (info.cpu_capability in ("AVX512", "AVX2"))
    assert ("avx512" in info.kernels) == (info.cpu_capability == "AVX512")
    assert info.kernels[-1] == "scalar" and info.kernel in info.kernels and info.kernel_reason
    assert json.loads(json.dumps(dataclasses.asdict(info)))["kernels"] == list(info.kernels)
    with pytest.raises(dataclasses.FrozenInstanceError):
        info.kernel = "scalar"


def test_info_prints_as_an_aligned_list():
    info = bitorch_qlinear.info()
    lines = str(info).splitlines()
    values = {"version": info.version, "cpu capability": info.cpu_capability, "kernels": ", ".join(info.kernels)}
    for label, value in values.items():
        assert f"{label:<16}{value}" in lines
    assert all(line[14:16] == "  " and line[16] != " " and len(line) <= 100 for line in lines)


# ---- the choice of a kernel ------------------------------------------------------------------------

WHICH = """
import torch, bitorch_qlinear
from bitorch_qlinear import _kernels, functional
words = functional.pack_bits(torch.ones(3, 70))
layout = int.from_bytes(bytes(functional.prepare_weight(words, 70)[8:12].tolist()), "little")
print(bitorch_qlinear.info().kernel, _kernels.prepared_layout()[0], layout, bitorch_qlinear.info().kernel_reason)
"""


@pytest.mark.parametrize("name", [*_kernels.available_kernels(), ""])
def test_kernel_by_environment(name):
    expected = name or _kernels.available_kernels()[0]
    result = run_python(WHICH, BITORCH_QLINEAR_CPU_KERNEL=name)
    assert result.returncode == 0, result.stderr
    kernel, panel, layout, reason = last_line(result).split(" ", 3)
    # The layout of prepared weights proves which kernel is active, independently of the name that it reports; amx has
    # that of avx512.
    forms = {"avx2": (64, 3), "avx512": (64, 4), "amx": (64, 4)}
    assert (kernel, int(panel), int(layout)) == (expected, *forms.get(expected, (1, 0)))
    automatic = expected == _kernels.available_kernels()[0]
    assert ("forced" in reason) != automatic


@pytest.mark.parametrize("name", ["avx1024", "AVX2", "scalar "])
def test_unknown_kernel_is_an_error_at_import(name):
    result = run_python("import bitorch_qlinear", BITORCH_QLINEAR_CPU_KERNEL=name)
    kernels = ", ".join(_kernels.available_kernels())
    assert result.returncode != 0
    assert last_line(result) == (
        f"RuntimeError: BITORCH_QLINEAR_CPU_KERNEL: expected one of the kernels that this processor can run "
        f'({kernels}), got "{name}"'
    )


@pytest.mark.slow
def test_the_former_name_of_the_variable_is_an_error_at_import():
    """If the old name were ignored, a test or benchmark would silently use another kernel than the requested one."""
    result = run_python("import bitorch_qlinear", BITORCH_QLINEAR_CPU="scalar")
    assert result.returncode != 0
    assert last_line(result) == (
        "RuntimeError: BITORCH_QLINEAR_CPU is called BITORCH_QLINEAR_CPU_KERNEL now: unset it, and set "
        "BITORCH_QLINEAR_CPU_KERNEL=scalar if you want that kernel"
    )
    assert run_python("import bitorch_qlinear", BITORCH_QLINEAR_CPU="").returncode == 0


# ---- a build that does not belong to the code ------------------------------------------------------

STALE = """
import sys, types
version = types.ModuleType("bitorch_qlinear._version")
version.__version__ = "99.0"
sys.modules["bitorch_qlinear._version"] = version
"""
STALE_OPERATORS_ONLY = f"""
SOURCES = {_library.build_info["sources"]!r}
module = types.ModuleType("bitorch_qlinear._C")
module.build_info = lambda: {{"version": "99.0", "sources": SOURCES}}
sys.modules["bitorch_qlinear._C"] = module
"""


@pytest.mark.parametrize(("patch", "part"), [(STALE, "module _C"), (STALE + STALE_OPERATORS_ONLY, "operators")])
def test_stale_build(patch, part):
    result = run_python(patch + "import bitorch_qlinear")
    assert result.returncode != 0
    assert last_line(result).startswith(
        f"ImportError: bitorch_qlinear 99.0 found its {part} built for version {bitorch_qlinear.__version__}: a stale "
    )
    assert "make build" in last_line(result) and "pip install" in last_line(result)


@pytest.mark.parametrize(
    ("part", "damage", "message"),
    [
        ("_C*.so", b"not a shared object", "bitorch_qlinear._C is not built for this Python"),
        ("_ops_cpu.so", b"not a shared object", "bitorch_qlinear's operators cannot be loaded by torch 2"),
        ("_ops_cpu.so", None, "bitorch_qlinear's operators are not built (_ops_cpu.so is missing)"),
    ],
)
def test_missing_and_damaged_builds(tmp_path, part, damage, message):
    copy = tmp_path / "bitorch_qlinear"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    (library,) = copy.glob(part)
    library.unlink() if damage is None else library.write_bytes(damage)
    result = run_python("import bitorch_qlinear", cwd=tmp_path)
    assert result.returncode != 0
    assert last_line(result).startswith(f"ImportError: {message}"), result.stderr
    assert "make build" in last_line(result)


def copy_of_the_package(folder, with_sources):
    shutil.copytree(PACKAGE, folder / "bitorch_qlinear", ignore=shutil.ignore_patterns("__pycache__"))
    if with_sources:
        shutil.copytree(CHECKOUT / "csrc", folder / "csrc")
        shutil.copy(CHECKOUT / "setup.py", folder)
    return folder / "bitorch_qlinear"


OTHER_SOURCES = (
    f"ImportError: bitorch_qlinear {bitorch_qlinear.__version__} found its {{}} built from other sources than "
)


@pytest.mark.slow
@pytest.mark.parametrize("changed", ["csrc/cpu/pack_portable.h", "csrc/cuda/pack.cu", "csrc/new.cpp", "setup.py", None])
def test_stale_build_of_the_same_version(tmp_path, changed):
    copy_of_the_package(tmp_path, with_sources=True)
    if changed:
        with (tmp_path / changed).open("a") as file:
            file.write("\n")
    result = run_python("import bitorch_qlinear; print('imported')", cwd=tmp_path)
    if changed:
        assert last_line(result).startswith(OTHER_SOURCES.format("module _C") + "those in csrc: a stale build; ")
        assert "make build" in last_line(result) and result.returncode != 0
    else:
        assert last_line(result) == "imported"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new"),
    [
        (_library.build_info["sources"].encode(), b"0" * 64),
        (b"\0bitorch_qlinear_sources\0", b"\0bitorch_qlinear_no_such\0"),  # older libraries had no digest
    ],
    ids=["another", "none"],
)
@pytest.mark.parametrize("with_sources", [False, True])
def test_operators_from_other_sources_than_the_module(tmp_path, with_sources, old, new):
    library = copy_of_the_package(tmp_path, with_sources) / "_ops_cpu.so"
    content = library.read_bytes()
    assert old in content and len(old) == len(new)
    library.write_bytes(content.replace(old, new))
    result = run_python("import bitorch_qlinear", cwd=tmp_path)
    assert result.returncode != 0
    assert last_line(result).startswith(OTHER_SOURCES.format("operators") + "its module _C: a stale build; ")
    assert "make build" in last_line(result)


@pytest.mark.slow
def test_a_module_without_a_digest_is_a_stale_build(tmp_path):
    result = run_python(
        "import sys, types\n"
        "module = types.ModuleType('bitorch_qlinear._C')\n"
        f"module.build_info = lambda: {{'version': {bitorch_qlinear.__version__!r}}}\n"
        "sys.modules['bitorch_qlinear._C'] = module\n"
        "import bitorch_qlinear"
    )
    assert last_line(result).startswith(OTHER_SOURCES.format("module _C")) and "make build" in last_line(result)


def test_the_digest_depends_on_names_and_contents(tmp_path):
    def digest(**files):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        for name, content in {"setup.py": "", "csrc/torch/ops_cpu.cpp": "", **files}.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(content)
        return _sources.digest(folder)

    different = [
        digest(),
        digest(**{"setup.py": "x"}),
        digest(**{"csrc/torch/ops_cpu.cpp": "x"}),
        digest(**{"csrc/a.h": "ab", "csrc/b.h": "c"}),
        digest(**{"csrc/a.h": "a", "csrc/b.h": "bc"}),
        digest(**{"csrc/b.h": "a", "csrc/a.h": "bc"}),
        digest(**{"csrc/a.h": "a", "csrc/cpu/b.h": "bc"}),
        digest(**{"csrc/a.h": "abc"}),
    ]
    assert len({*different}) == len(different) and None not in different
    assert digest(**{"csrc/.#ops.cpp": "x", "csrc/DESIGN.md": "x", "README.md": "x"}) == different[0]


def test_no_digest_beside_an_installed_package(tmp_path):
    assert _sources.digest(tmp_path) is None
    (tmp_path / "csrc" / "torch").mkdir(parents=True)
    (tmp_path / "csrc" / "foreign.cpp").touch()
    assert _sources.digest(tmp_path) is None
    (tmp_path / "csrc" / "torch" / "ops_cpu.cpp").touch()
    assert _sources.digest(tmp_path) is None  # there is no setup.py


# ---- setup.py ----------------------------------------------------------------------------------------


def run_setup(folder, *arguments, **environment):
    """Run setup.py in a folder and return the completed process with its output."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("BITORCH_QLINEAR_")}
    return subprocess.run(
        [sys.executable, "setup.py", "-q", *arguments],
        cwd=folder,
        env={**variables, "BITORCH_QLINEAR_BUILD_CUDA": "0", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
def test_sdist_holds_every_tracked_file(tmp_path):
    pytest.importorskip("pybind11")
    if not (CHECKOUT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("there is no git checkout to compare with")
    listed = subprocess.run(["git", "ls-files"], cwd=CHECKOUT, capture_output=True, text=True, check=True)
    tracked = {name for name in listed.stdout.splitlines() if (CHECKOUT / name).exists()}
    assert {"csrc/cuda/pack.cu", "tests/support/reference.py", "Makefile"} <= tracked
    for name in tracked:
        (tmp_path / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(CHECKOUT / name, tmp_path / "copy" / name)
    result = run_setup(tmp_path / "copy", "sdist", "-d", str(tmp_path / "out"))
    assert result.returncode == 0, result.stdout
    (archive,) = (tmp_path / "out").iterdir()
    with tarfile.open(archive) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    assert tracked - names == {".gitignore"}


@pytest.fixture
def hollow(tmp_path):
    """Return a checkout whose C++ files, except the one with the digest, are empty, so that it compiles in seconds."""
    pytest.importorskip("pybind11")
    copy_of_the_package(tmp_path, with_sources=True)
    for path in (*tmp_path.glob("csrc/**/*.cpp"), *tmp_path.glob("bitorch_qlinear/*.so")):
        if path.suffix == ".so":
            path.unlink()
        elif path.name != "sources.cpp":
            path.write_text("")
    return tmp_path


@pytest.mark.slow
def test_build_has_a_digest_and_a_record(hollow):
    result = run_setup(hollow, "build_ext", "--inplace", BITORCH_QLINEAR_BUILT_BY="this environment")
    assert result.returncode == 0, result.stdout
    assert (hollow / "build" / "built-by").read_text() == "this environment\n"
    libraries = [*hollow.glob("bitorch_qlinear/*.so")]
    assert len(libraries) == 2
    assert all(_sources.digest(hollow).encode() in library.read_bytes() for library in libraries)

    # A change with an older timestamp, as a copy may have, is compiled. This time the builder has no name.
    changed = hollow / "csrc" / "cpu" / "cpu_features.cpp"
    changed.write_text('extern "C" __attribute__((visibility("default"))) const char* text() { return "new content"; }')
    os.utime(changed, (1e9, 1e9))
    result = run_setup(hollow, "build_ext", "--inplace")
    assert result.returncode == 0, result.stdout
    assert (hollow / "build" / "built-by").read_text() == "\n"
    for library in libraries:
        assert _sources.digest(hollow).encode() in library.read_bytes()
        assert b"new content" in library.read_bytes()


@pytest.mark.slow
def test_the_old_name_of_the_cuda_switch_stops_a_build(hollow):
    result = run_setup(hollow, "build_ext", "--inplace", BITORCH_QLINEAR_CUDA="0")
    assert result.returncode != 0 and not [*hollow.glob("bitorch_qlinear/*.so")]
    assert result.stdout.splitlines()[-1] == (
        "bitorch_qlinear: BITORCH_QLINEAR_CUDA is now named BITORCH_QLINEAR_BUILD_CUDA: set that one instead."
    )


@pytest.mark.slow
def test_the_error_names_a_setuptools_that_cannot_make_wheels():
    code = (
        "import runpy, sys\n"
        "sys.modules['setuptools.command.bdist_wheel'] = sys.modules['wheel'] = None\n"
        "sys.argv = ['setup.py', 'dist_info']\n"
        "runpy.run_path('setup.py', run_name='__main__')"
    )
    result = run_python(code, cwd=CHECKOUT, BITORCH_QLINEAR_BUILD_CUDA="0")
    assert result.returncode != 0
    assert re.search(r"this setuptools \(\S+\) cannot make wheels: run \"pip install 'setuptools>=", last_line(result))


def test_readme_installs_what_the_build_requires():
    (requires,) = re.findall(r"^requires = (\[.*\])$", (CHECKOUT / "pyproject.toml").read_text(), re.MULTILINE)
    (line,) = re.findall(r"^pip install torch .*$", (CHECKOUT / "README.md").read_text(), re.MULTILINE)
    assert {*json.loads(requires)} <= {word.strip('"') for word in line.split()}


@pytest.fixture(scope="module")
def decide_cuda():
    """Return decide_cuda of setup.py, which builds nothing if it is imported as a module."""
    spec = importlib.util.spec_from_file_location("setup_of_bitorch_qlinear", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    before = Path.cwd()
    os.chdir(ROOT)  # its source paths are relative to its folder
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("BITORCH_QLINEAR_BUILD_CUDA", raising=False)
            spec.loader.exec_module(module)
    finally:
        os.chdir(before)
    return module.decide_cuda


@pytest.mark.parametrize(
    ("switch", "torch_cuda", "nvcc", "expected", "reason"),
    [
        ("0", "13.0", "13.0", False, "BITORCH_QLINEAR_BUILD_CUDA=0"),
        ("0", None, None, False, "BITORCH_QLINEAR_BUILD_CUDA=0"),
        ("1", "13.0", "13.0", True, "BITORCH_QLINEAR_BUILD_CUDA=1"),
        (None, "13.0", "13.2", True, "nvcc 13.2 and torch for CUDA 13.0"),
        ("", "12.6", "12.8", True, "12.6"),
        (None, None, "13.0", False, "without CUDA"),
        (None, "13.0", None, False, "no nvcc"),
        (None, "12.8", "13.0", False, "this torch is built for CUDA 12.8 and nvcc is of CUDA 13.0"),
        ("", None, None, False, "without CUDA, .*no nvcc"),
    ],
)
def test_cuda_decision(decide_cuda, switch, torch_cuda, nvcc, expected, reason):
    decision, why = decide_cuda(switch, torch_cuda, nvcc)
    assert decision is expected and re.search(reason, why)


@pytest.mark.parametrize(
    ("switch", "torch_cuda", "nvcc", "message"),
    [
        ("1", None, "13.0", "without CUDA"),
        ("1", "13.0", None, "no nvcc"),
        ("1", "12.8", "13.0", "built for CUDA 12.8"),
        ("yes", "13.0", "13.0", "must be 0 or 1, not 'yes'"),
        ("2", None, None, "must be 0 or 1"),
    ],
)
def test_cuda_switch_that_cannot_be_followed(decide_cuda, switch, torch_cuda, nvcc, message):
    with pytest.raises(ValueError, match=message):
        decide_cuda(switch, torch_cuda, nvcc)


@pytest.mark.parametrize(
    ("build", "torch_cuda", "reason"),
    [
        ({"cuda_targets": "sm_80", "cuda_version": "13.0"}, "13.2", ""),
        ({"cuda_targets": "sm_80", "cuda_version": "13.0"}, "12.8", "built for CUDA 13.0, this torch for CUDA 12.8"),
        ({"cuda_targets": "sm_80", "cuda_version": "13.0"}, None, "this torch is built without CUDA"),
        ({"cuda_targets": "", "cuda_reason": "there is no nvcc"}, "13.0", "without CUDA operators .there is no nvcc"),
        ({"cuda_targets": "", "cuda_reason": "there is no nvcc"}, None, "this torch is built without CUDA"),
    ],
)
def test_reason_against_cuda(build, torch_cuda, reason):
    assert re.search(reason, _library._reason_against_cuda(build, torch_cuda))
    assert bool(_library._reason_against_cuda(build, torch_cuda)) == bool(reason)


@pytest.mark.slow
def test_no_exception_leaves_an_exported_c_function():
    code = (
        "import ctypes, sys; lib = ctypes.CDLL(sys.argv[1]); out = (ctypes.c_int64 * 4)()\n"
        "for name in ('kernel', 'kernel_reason'):\n"
        "    f = getattr(lib, 'bitorch_qlinear_' + name); f.restype = ctypes.c_char_p; assert b'nope' in f()\n"
        "lib.bitorch_qlinear_layout.restype = ctypes.c_bool; assert not lib.bitorch_qlinear_layout(out)\n"
    )
    code = "import torch\n" + code  # this loads the libraries that the operators need
    environment = {**os.environ, "BITORCH_QLINEAR_CPU_KERNEL": "nope"}
    subprocess.run([sys.executable, "-c", code, str(_library._OPERATORS)], env=environment, check=True)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="x86-64's instructions")
@pytest.mark.parametrize(
    ("kernel", "instruction"),
    [
        ("multiply_tile<", r"vpopcntd .*%zmm"),  # gemm_avx512.cpp; the processor need not have AVX-512
        ("multiply_part<", r"tdpbssd "),  # byte_gemm_amx.cpp, likewise
        ("pair_planar", r"vpshufb .*%ymm"),  # gemm_avx2.cpp
        ("gemm_tables.*add_block", r"vpaddb 0x[0-9a-f]*\(.*%ymm"),
        ("gemm_by_words.*Tile", r"popcnt .*%r"),  # gemm_popcnt.cpp
    ],
)
def test_machine_code_has_the_kernels_characteristic_instruction(kernel, instruction):
    library = PACKAGE / "_ops_cpu.so"
    text = subprocess.run(["objdump", "-dC", "--no-show-raw-insn", library], capture_output=True, text=True, check=True)
    functions = re.split(r"\n\n[0-9a-f]+ <", text.stdout)
    code = [function for function in functions if re.search(kernel, function.partition(">:\n")[0])]
    assert code and any(re.search(instruction, function) for function in code)
