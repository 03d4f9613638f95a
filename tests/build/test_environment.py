"""tools/environment.py: records that decide what is made again, steps in order, and a message for what is missing."""

import importlib.util
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tools import environment
from tools.environment import Environment, missing_packages, pytest_options, shorten

CHECKOUT = Path(__file__).resolve().parents[2]


def run_make(*arguments, folder=CHECKOUT, **variables):
    """Run make with these arguments, and without the choices of a make that may be running the tests."""
    chosen = ("BITORCH_QLINEAR_", "CXX", "MAKE", "MFLAGS", "PYTHON", "SYSTEM_TORCH", "TORCH", "VENV")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(chosen)}
    command = ["make", *([] if "PYTHON" in variables else [f"PYTHON={sys.executable}"]), *arguments]
    return subprocess.run(command, cwd=folder, env=kept | variables, capture_output=True, text=True, timeout=300)


def script(path, text):
    """Write an executable shell script."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def copy_of_the_checkout(folder):
    """Copy what the set-up reads; the sources are tiny."""
    for name in ("Makefile", "setup.py", "pyproject.toml", "tools/environment.py", "bitorch_qlinear/_sources.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(CHECKOUT / name, folder / name)
    shutil.copy(CHECKOUT / "bitorch_qlinear" / "_version.py", folder / "bitorch_qlinear")
    # The digest knows a checkout by the files that csrc has.
    shutil.copytree(CHECKOUT / "csrc", folder / "csrc", ignore=lambda _, names: [n for n in names if n[-3:] == ".cu"])
    for path in (path for path in (folder / "csrc").rglob("*") if path.is_file()):
        path.write_text("x")


@pytest.fixture
def checkout(tmp_path):
    copy_of_the_checkout(tmp_path)
    return tmp_path


@pytest.fixture
def setup(checkout):
    """Return an environment of a checkout in which nothing is made yet."""
    return Environment("torch==1", root=checkout, python="the python", variables={"PATH": os.environ["PATH"]})


def make_everything(setup, *extras):
    """Write the records that a complete set-up leaves, without what they describe."""
    setup.folder.mkdir(exist_ok=True)
    (setup.folder / "config").write_text(setup.venv_record() + "\n")
    if not (setup.folder / "tools").exists():
        (setup.folder / "tools").write_text(f"{time.time_ns()}\n")
    (setup.root / "bitorch_qlinear" / "_ops_cpu.so").touch()
    (setup.root / "build").mkdir(exist_ok=True)
    (setup.root / "build" / "built-by").write_text(setup.build_record() + "\n")
    record = f'{{"metadata": "{setup.metadata_digest()}", "extras": {["", *extras]}}}'
    (setup.folder / "installed").write_text(record.replace("'", '"'))


def steps(setup, *extras):
    """Return the steps that a set-up would take, in order."""
    taken = []

    class Recorder(Environment):
        def make_venv(self):
            taken.append("venv")
            self.folder.mkdir(exist_ok=True)
            (self.folder / "config").write_text(self.venv_record())
            (self.folder / "tools").unlink(missing_ok=True)

        def install_tools(self):
            taken.append("tools")
            (self.folder / "tools").write_text(f"{time.time_ns()}")

        def compile(self):
            taken.append("compile")

        def install(self, extras):
            taken.append(",".join(sorted(extras - {""})))

    fields = (setup.torch, setup.index, setup.system, setup.venv, setup.python, setup.root, setup.variables)
    Recorder(*fields).set_up(extras)
    return taken


# ---- records -----------------------------------------------------------------------------------------


def test_all_steps_are_taken_once(setup):
    assert steps(setup, "test", "lint") == ["venv", "tools", "compile", "lint,test"]
    make_everything(setup, "lint", "test")
    assert steps(setup, "test") == []


def test_interrupted_steps_are_taken_again(setup):
    make_everything(setup, "test")
    (setup.root / "build" / "built-by").write_text("")  # setup.py empties it before it replaces a library
    assert steps(setup, "test") == ["compile"]
    (setup.folder / "tools").unlink()
    assert steps(setup, "test") == ["tools", "compile"]
    (setup.folder / "config").unlink()
    assert steps(setup, "test")[0] == "venv"


@pytest.mark.parametrize("change", [{"torch": "torch==2"}, {"index": "https://example.org"}])
def test_another_torch_makes_everything_again(setup, change):
    make_everything(setup, "test")
    assert steps(replace(setup, **change), "test")[:3] == ["venv", "tools", "compile"]


def test_another_python_makes_everything_again(setup, monkeypatch):
    make_everything(setup, "test")
    monkeypatch.setattr(sys, "base_prefix", "/moved")
    assert steps(setup, "test")[:3] == ["venv", "tools", "compile"]
    make_everything(setup, "test")
    monkeypatch.setattr(sys, "prefix", "/an/activated/environment/of/the/same/python")
    assert steps(setup, "test") == []


def test_another_torch_of_the_system_makes_everything_again(setup, monkeypatch):
    setup = replace(setup, system=True)
    monkeypatch.setattr(environment.importlib.metadata, "version", lambda name: "2.13.0")
    make_everything(setup, "test")
    assert steps(setup, "test") == []
    monkeypatch.setattr(environment.importlib.metadata, "version", lambda name: "2.14.1")
    assert steps(setup, "test")[:3] == ["venv", "tools", "compile"]


def test_environments_of_one_checkout_notice_each_others_builds(setup):
    other = replace(setup, venv=".venv-b")
    make_everything(setup, "test")
    make_everything(other, "test")
    assert steps(other, "test") == []
    assert steps(setup, "test") == ["compile"]


@pytest.mark.parametrize(
    "variables", [{"CXX": "another"}, {"BITORCH_QLINEAR_BUILD_CUDA": "0"}, {"TORCH_CUDA_ARCH_LIST": "9.0a"}]
)
def test_other_choices_of_the_build_are_noticed(setup, variables):
    make_everything(setup, "test")
    assert steps(replace(setup, variables=setup.variables | variables), "test") == ["compile"]


def test_a_new_environment_with_the_same_choices_compiles_again(setup):
    make_everything(setup, "test")
    shutil.rmtree(setup.folder)
    assert steps(setup, "test") == ["venv", "tools", "compile", "test"]


@pytest.mark.parametrize("name", ["csrc/torch/ops.cpp", "setup.py"])
def test_changed_sources_are_noticed_whatever_their_timestamps(setup, name):
    make_everything(setup, "test")
    path = setup.root / name
    path.write_text("y")
    os.utime(path, (1e9, 1e9))
    assert steps(setup, "test")[0] == "compile"


def test_build_without_make_is_noticed(setup):
    make_everything(setup, "test")
    (setup.root / "build" / "built-by").write_text("\n")
    assert steps(setup, "test") == ["compile"]


def test_a_missing_library_is_noticed(setup):
    make_everything(setup, "test")
    (setup.root / "bitorch_qlinear" / "_ops_cpu.so").unlink()
    assert steps(setup, "test") == ["compile"]


def test_an_edit_during_the_build_is_noticed(setup):
    """The record that setup.py writes is the one that it was given before it compiled."""
    make_everything(setup, "test")
    source = next((setup.root / "csrc").rglob("ops.cpp"))
    source.write_text("edited before")
    edit = f'echo edited during > {source}; echo "$BITORCH_QLINEAR_BUILT_BY" > build/built-by'
    script(setup.root / setup.interpreter, edit)
    setup.compile()
    assert not setup.is_compiled()
    script(setup.root / setup.interpreter, 'echo "$BITORCH_QLINEAR_BUILT_BY" > build/built-by')
    setup.compile()
    assert setup.is_compiled()


def test_extras_are_added_and_stay(setup):
    make_everything(setup, "demo")
    assert steps(setup, "demo") == [] and steps(setup, "lint") == ["demo,lint"]
    with (setup.root / "pyproject.toml").open("a") as file:
        file.write("\n# another\n")
    assert steps(setup, "lint") == ["compile", "lint"]


def test_the_record_of_the_former_makefile_is_replaced(setup):
    make_everything(setup, "test")
    (setup.folder / "installed").write_text("")
    assert steps(setup, "test") == ["test"]


def test_every_target_names_extras_that_exist():
    text = (CHECKOUT / "pyproject.toml").read_text()
    for extras in environment.EXTRAS.values():
        assert all(f"\n{extra} = [" in text for extra in extras if extra != "docs")
    assert environment.EXTRAS["demo"] == ("demo",)


# ---- messages ----------------------------------------------------------------------------------------


def message(function, *arguments):
    with pytest.raises(SystemExit) as end:
        function(*arguments)
    return end.value.code


def test_the_old_name_of_the_cuda_switch(setup):
    setup.variables["BITORCH_QLINEAR_CUDA"] = "0"
    assert message(steps, setup, "test") == (
        "make: BITORCH_QLINEAR_CUDA is now named BITORCH_QLINEAR_BUILD_CUDA: set that one instead"
    )


@pytest.mark.parametrize(("chosen", "named"), [("", "c++"), ("/no/such g++", "/no/such g++")])
def test_no_compiler(setup, chosen, named):
    setup.variables.update({"PATH": "/nowhere", "CXX": chosen})
    assert f"there is no C++ compiler '{named}': install one" in message(steps, setup, "test")
    assert not setup.folder.exists()


def test_a_chosen_compiler_may_have_arguments(setup, tmp_path):
    script(tmp_path / "bin" / "cache", "")
    setup.variables.update({"PATH": str(tmp_path / "bin"), "CXX": "cache c++"})
    setup.check_compiler()
    script(tmp_path / "bin" / "clang++", "")
    setup.variables["CXX"] = ""
    setup.check_compiler()


def test_no_venv_module(setup, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ensurepip" else object())
    assert "'the python' has no venv module: install it" in message(steps, setup, "test")
    replace(setup, system=True).check_venv_module()  # pip comes with the system's packages


def test_a_torch_that_cannot_be_installed_leaves_the_environment(setup):
    make_everything(setup, "test")
    script(setup.root / setup.interpreter, 'echo "$@" > asked; exit 1')
    wrong = replace(setup, torch="torch==99", index="https://example.org")
    assert message(wrong.set_up, ["test"]) == "make: pip finds no 'torch==99': .venv stays as it is."
    assert "--dry-run" in (setup.root / "asked").read_text()
    assert "--index-url https://example.org torch==99" in (setup.root / "asked").read_text()
    assert setup.has_tools() and steps(setup, "test") == []


def test_a_system_without_torch(setup, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "executable", str(script(tmp_path / "python", "echo 'Error: no torch' >&2; exit 1")))
    said = message(steps, replace(setup, system=True, torch="ignored"), "test")
    assert said.startswith(
        "make: SYSTEM_TORCH=1 takes the torch of 'the python', which does not import (Error: no torch)"
    )


def test_a_failed_step_ends_with_its_exit_code(setup):
    make_everything(setup)
    script(setup.root / setup.interpreter, "exit 7")
    assert message(setup.install, {"", "test"}) == 7 and message(setup.compile) == 7
    assert steps(setup, "test")[-1] == "test"


def test_make_names_a_python_that_does_not_run(checkout):
    result = run_make("build", folder=checkout, PYTHON="/no/such/python")
    assert result.returncode and "'/no/such/python' does not run here: install Python 3.10 or later" in result.stderr


def test_make_names_a_python_that_is_too_old(checkout, tmp_path):
    old = script(
        tmp_path / "old", 'case "$1 $2" in "--version "*) echo Python 3.8.1;; *version_info*) exit 1;; *) exit 0;; esac'
    )
    result = run_make("build", folder=checkout, PYTHON=str(old))
    assert result.returncode and f"'{old}' is Python 3.8.1: install Python 3.10 or later" in result.stderr


# ---- packages of a system ----------------------------------------------------------------------------

REQUIREMENTS = [
    "torch>=2.10",
    'Scikit_Learn; extra == "demo"',
    "bitorch_qlinear[demo]; extra == 'test'",
    'pytest>=8; extra == "test"',
    'ruff==1; extra == "lint"',
]


@pytest.mark.parametrize(
    ("have", "extras", "needed", "optional"),
    [
        (["torch", "scikit-learn", "bitorch-qlinear", "pytest", "ruff"], ["test", "lint"], [], []),
        (["pytest", "bitorch_qlinear"], ["test"], ["torch"], ["Scikit_Learn"]),
        (["torch", "bitorch_qlinear"], ["lint"], [], ["ruff"]),
        (["torch"], [], [], []),
    ],
)
def test_missing_packages(have, extras, needed, optional):
    assert missing_packages(REQUIREMENTS, have, extras) == (needed, optional)


def test_missing_packages_end_or_are_named(monkeypatch, capsys):
    monkeypatch.setattr(environment.importlib.metadata, "requires", lambda _: ["no-such; extra == 'demo'"])
    environment.report_missing("the python", ["demo"])
    assert capsys.readouterr().out.startswith("make: going on without no-such (")
    monkeypatch.setattr(environment.importlib.metadata, "requires", lambda _: ["no-such>=1"])
    assert "the package needs no-such: install it for 'the python'" in message(
        environment.report_missing, "the python", []
    )


def test_options_of_pytest_follow_the_plugins(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert pytest_options([]) == ["-n", "auto", "--cov"]
    assert pytest_options(["-k", "pack"]) == ["-n", "auto", "--cov", "--cov-fail-under=0"]
    assert environment.parallel_options() == ["-n", "auto"]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert pytest_options([]) == environment.parallel_options() == []


def test_the_command_line_takes_options_of_pytest(capsys):
    environment.main(["pytest-options", "--", "-k", "pack"])
    assert capsys.readouterr().out.strip() == " ".join(pytest_options(["-k", "pack"]))


# ---- the build's output ------------------------------------------------------------------------------


def test_commands_are_shortened_and_warnings_stay():
    lines = [
        f"[1/2] c++ -MMD -O3 -c {CHECKOUT}/csrc/a.cpp -o a.o -DX\n",
        "csrc/a.cpp:1:2: warning: unused\n",
        "FAILED: b.o\n",
        "c++ -O3 -c csrc/b.cpp -o b.o\n",
    ]
    assert [*shorten(lines)] == [f"[1/2] {os.path.relpath(CHECKOUT / 'csrc/a.cpp')}\n", *lines[1:]]


# ---- end to end --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_make_sets_up_with_the_systems_torch_and_without_a_network(tmp_path):
    """Everything is real, except that the C++ files are empty: only the file with the digest is compiled in full."""
    pytest.importorskip("pybind11")
    shutil.copytree(CHECKOUT / "csrc", tmp_path / "csrc")
    for name in ("Makefile", "setup.py", "pyproject.toml", "README.md"):
        shutil.copy(CHECKOUT / name, tmp_path)
    shutil.copytree(CHECKOUT / "tools", tmp_path / "tools", ignore=shutil.ignore_patterns("ptx", "__pycache__"))
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(CHECKOUT / "bitorch_qlinear", tmp_path / "bitorch_qlinear", ignore=ignored)
    for path in tmp_path.glob("csrc/**/*.cpp"):
        if path.name != "sources.cpp":
            path.write_text("")
    choices = ["SYSTEM_TORCH=1", "BITORCH_QLINEAR_BUILD_CUDA=0", "PIP_NO_INDEX=1"]
    first = run_make("build", *choices, folder=tmp_path)
    assert first.returncode == 0, first.stdout + first.stderr
    assert "make: new .venv for" in first.stdout and "system torch" in first.stdout
    assert max(len(line) for line in first.stdout.splitlines() if line.startswith("[")) < 100
    assert len([*tmp_path.glob("bitorch_qlinear/*.so")]) == 2
    assert run_make("build", *choices, folder=tmp_path).stdout == ""
    other = run_make("build", *choices, "CXX=g++", folder=tmp_path)
    assert "build_ext" in other.stdout and "new .venv" not in other.stdout
    result = run_make("build", "SYSTEM_TORCH=1", "BITORCH_QLINEAR_CUDA=1", folder=tmp_path)
    assert result.returncode and "BITORCH_QLINEAR_CUDA is now named BITORCH_QLINEAR_BUILD_CUDA" in result.stderr
