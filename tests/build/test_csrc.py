"""Only one folder of csrc includes torch, and the drawing of csrc shows what exists."""

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

CHECKOUT = Path(__file__).parents[2]
CSRC = CHECKOUT / "csrc"


def cxx_files(folder: Path) -> list[Path]:
    """Return the C++ and CUDA files below a folder."""
    return sorted(path for path in folder.rglob("*") if path.suffix in (".h", ".cpp", ".cuh", ".cu"))


SOURCES = cxx_files(CSRC)
DRAWING = ElementTree.parse(CSRC / "overview.svg").getroot()
OF_TORCH = re.compile(r"torch/|ATen|c10/|caffe2/")


def includes(path):
    return re.findall(r'^\s*#\s*include\s*([<"][^>"]+[>"])', path.read_text(), re.M)


def drawn(name):
    """Return the words in the drawing's texts of one class."""
    return [word for text in DRAWING.findall(".//{*}text") if text.get("class") == name for word in text.text.split()]


def test_only_one_folder_includes_torch():
    """Kernels, dispatch and the sharing of work are C++ that builds and is tested without torch."""
    seeing = {path for path in SOURCES if any(OF_TORCH.match(name[1:]) for name in includes(path))}
    assert {path.relative_to(CSRC).parts[0] for path in seeing} == {"torch"}


def test_no_other_folder_includes_torch_through_our_own_headers():
    def is_ours(path):
        return CSRC / "torch" in path.parents

    for path in SOURCES:
        if not is_ours(path):
            reached = [(path.parent / name[1:-1]).resolve() for name in includes(path) if name[0] == '"']
            assert not any(is_ours(header) for header in reached), path


def test_setup_compiles_every_source():
    """setup.py names torch's folder by file, because the two devices' operators are two libraries."""
    text = (CHECKOUT / "setup.py").read_text()
    for path in (CSRC / "torch").glob("*.cpp"):
        assert f'"csrc/torch/{path.name}"' in text
    assert {path.parent.name for path in SOURCES if path.suffix in (".cpp", ".cu")} == {"csrc", "torch", "cpu", "cuda"}


def test_lines_have_at_most_120_columns():
    """clang-format keeps the lines of comments as their author wrote them, so it does not find long ones."""
    files = [*SOURCES, *(path for folder in ("tests", "tools") for path in cxx_files(CHECKOUT / folder))]
    long = [
        f"{path.relative_to(CHECKOUT)}:{number}"
        for path in files
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if len(line) > 120
    ]
    assert not long


def test_drawn_files_exist():
    files = drawn("file")
    assert len(files) > 5
    for name in files:
        assert (CHECKOUT / name).is_file(), name
    for name in drawn("sign-file"):
        assert (CSRC / "cpu" / name).is_file(), name


@pytest.mark.parametrize(
    ("name", "pattern"),
    [("name", r"^(?:class {0}\(|[\w&*]+[\w&* ]* {0}\([^;{{]*\{{)"), ("operator-name", r'library\.def\(\s*"{}\(')],
)
def test_drawn_names_are_defined(name, pattern):
    """Each drawn name is defined in one of the drawn files."""
    texts = [(CHECKOUT / file).read_text() for file in drawn("file")]
    names = drawn(name)
    assert len(names) > 3
    for word in names:
        assert any(re.search(pattern.format(word), text, re.M) for text in texts), word


def test_every_operator_is_drawn():
    defined = re.findall(r'library\.def\(\s*"(\w+)\(', (CSRC / "torch" / "ops.cpp").read_text())
    assert sorted(drawn("operator-name")) == sorted(defined)


def test_every_kernel_is_drawn_with_its_file():
    records = [path.read_text() for path in (CSRC / "cpu").glob("gemm_*.cpp")]
    cpu = [name for text in records for name in re.findall(r'(?:\.name = | = record\(\s*)"(\w+)"', text)]
    cuda = re.findall(r'^ *\{GemmKernel::\w+, "(\w+)"', (CSRC / "cuda" / "records.h").read_text(), re.M)
    assert sorted(drawn("kernel-name")) == sorted([*cpu, *cuda])
    files = {path.name for path in SOURCES if path.stem.startswith("gemm_") and path.suffix != ".cuh"}
    assert sorted(drawn("kernel-file")) == sorted(files - {"gemm_unprepared.h"})
