"""Only one file of the package uses private names of torch, and each of them has a fallback for a torch without it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import bitorch_qlinear

PACKAGE = Path(bitorch_qlinear.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
# These are the tables of nn.Module, whose own comments allow subclasses to read them, and the methods that a subclass
# overrides to take part in loading, saving and moving.
MODULE_NAMES = {"_parameters", "_buffers", "_modules", "_apply", "_load_from_state_dict", "_save_to_state_dict"}
# These are documented despite their names.
PUBLIC = {"torch._check", "_asdict", "_replace", "_getframe"}
# transformers marks the tensors that it has read by this name, which the models' own _init_weights read, too. Without
# the mark, bitorch_qlinear.transformers refuses every packed folder.
OF_TRANSFORMERS = {"_is_hf_initialized"}


def is_private(name: str) -> bool:
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__"))


def own_names(trees) -> set[str]:
    """Return the names of everything that the package itself defines."""
    names = set()
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                names.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                names.add(node.attr)
    return names


TREES = {path: ast.parse(path.read_text()) for path in FILES}
OWN = own_names(TREES.values()) | {path.stem for path in FILES} | {"_C"}


def private_names(tree: ast.AST) -> list[str]:
    """Return the names with a leading underscore that the file reads or imports from others, also through getattr."""
    found = []
    known = OWN | MODULE_NAMES | OF_TRANSFORMERS
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            of_torch = ast.unparse(node.value).split(".")[0] in ("torch", "nn", "F", "forward_ad")
            if {node.attr, ast.unparse(node)} & PUBLIC:
                continue
            if of_torch or node.attr not in OWN | MODULE_NAMES:
                found.append(f"line {node.lineno}: {ast.unparse(node)}")
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            parts = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            found += [f"line {node.lineno}: import of {part}" for part in parts if is_private(part)]
        elif isinstance(node, ast.Import):
            found += [f"line {node.lineno}: {a.name}" for a in node.names if any(map(is_private, a.name.split(".")))]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr") and len(node.args) > 1:
            name = node.args[1]
            if isinstance(name, ast.Constant) and is_private(str(name.value)) and name.value not in known:
                found.append(f"line {node.lineno}: {ast.unparse(node)}")
    return found


@pytest.mark.parametrize("path", [path for path in FILES if path.name != "_torch.py"], ids=lambda path: path.name)
def test_no_other_file_uses_private_names(path):
    assert private_names(TREES[path]) == []


def test_private_names_are_found():
    source = (
        "import torch\nfrom torch._C import x\ntorch._C.f\ny._version_of_torch\nself._modules\ngetattr(z, '_op', 1)\n"
    )
    assert [name.partition(":")[0] for name in private_names(ast.parse(source))] == [
        *("line 2", "line 4", "line 6", "line 3")
    ]


@pytest.mark.slow
def test_import_adds_no_part_of_torch_that_is_slow_to_import():
    code = (
        "import sys, torch; before = set(sys.modules); import bitorch_qlinear; "
        "print(*sorted(name for name in set(sys.modules) - before if name.split('.')[0] != 'bitorch_qlinear'))"
    )
    added = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    slow = ("torch._dynamo", "torch._inductor", "torch.distributed", "torch.fx", "torch.onnx", "sympy", "numpy", "tqdm")
    assert [name for name in added if name.startswith(slow)] == []


PARTS = ["_is_any_autocast_enabled", "_are_functorch_transforms_active"]


@pytest.mark.slow
@pytest.mark.parametrize("missing", PARTS)
def test_a_torch_without_a_private_name_computes_the_same(missing):
    code = f"""
import torch
kept = torch._C.{missing}
del torch._C.{missing}
from bitorch_qlinear import QLinear, pack
torch._C.{missing} = kept  # torch itself cannot do without
layer, x = QLinear(70, 9), torch.randn(3, 70, requires_grad=True)
y = layer(x)
y.sum().backward()
assert torch.equal(pack(layer)(x), y)
with torch.autocast("cpu"):
    assert layer(x).dtype is torch.bfloat16
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
