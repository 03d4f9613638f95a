# Each target sets up all that it needs: .venv, torch, the other dependencies, the compiled extension. Done once, it
# starts in seconds; `make help` lists the targets and what can be chosen.

PYTHON ?= python3
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
SYSTEM_TORCH ?=
ifdef BITORCH_QLINEAR_CUDA
$(error BITORCH_QLINEAR_CUDA is now named BITORCH_QLINEAR_BUILD_CUDA: set that one instead)
endif
ARGS ?=
RESULTS ?= benchmarks/results/gpu

comma := ,
# SYSTEM_TORCH=0 means no.
SYSTEM := $(filter-out 0,$(SYSTEM_TORCH))
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
OPS := bitorch_qlinear/_ops_cpu.so
CXX_SOURCES = $(shell find csrc benchmarks tests/native tests/ptx -name __pycache__ -prune -o \( -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' \) -print)
# A shell function for recipes: end with one sentence.
DIE := die() { echo "make: $$*" >&2; exit 1; }

.PHONY: help demo test docs fuzz sanitize neon simde benchmark benchmark-check lint format build gpu ptx-full ptx-report clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):[^#]*## /\1 /p' Makefile | \
	while read target what; do printf '  make %-15s %s\n' $$target "$$what"; done
	@echo 'Choices, as in "make test TORCH=torch==2.14.1":'
	@echo '  PYTHON=python3             the Python that .venv is made from, 3.10 or later'
	@echo '  TORCH=torch==2.13.0        the torch to install'
	@echo '  TORCH_INDEX=URL            where from, such as https://download.pytorch.org/whl/cpu'
	@echo '  SYSTEM_TORCH=1             use the torch and packages that PYTHON has; needs no network'
	@echo '  BITORCH_QLINEAR_BUILD_CUDA=0|1  without or with CUDA operators; unset, the build decides, says why'
	@echo '  ARGS="-k pack"             arguments for pytest or the demo'
	@echo '  RESULTS=FOLDER             where make gpu writes ($(RESULTS))'

demo: build  ## train, pack and time a binarized classifier
	$(PY) -m examples.digits $(ARGS)

# A selection of tests covers less: only the whole run is held to the coverage that pyproject.toml asks for.
COVERAGE := --cov $(if $(ARGS),--cov-fail-under=0)
ifdef SYSTEM
HAS = $(PY) -c 'import $(1)' 2>/dev/null
PARALLEL = $$($(call HAS,xdist) && echo '-n auto')
test: COVER = $$($(call HAS,pytest_cov) && echo '$(COVERAGE)')
else
PARALLEL = -n auto
test: COVER = $(COVERAGE)
endif
test: build  ## run the tests, with coverage
	$(PY) -m pytest $(PARALLEL) $(COVER) $(ARGS)

# The kernels whose tests have shapes and targets to add; 8 minutes of processor time.
ptx-full: build  ## run the CUDA kernels' PTX of all targets on many more shapes; wants nvcc
	PTX_FULL=1 $(PY) -m pytest $(PARALLEL) tests/ptx $(ARGS)

ptx-report: build  ## count what the CUDA kernels' PTX does with memory; wants nvcc
	cd tests && CI=true ../$(PY) -m ptx.report

fuzz: build  ## call the operators with 100,000 sets of hostile arguments
	PYTHONPATH=tests $(PY) -m fuzz $(or $(ARGS),--cases 100000)

# Beside what the compilers' sanitizers see in the standalone tests, what gcc's see in the operators while they are fuzzed:
# the package as it is, but for its operators. Preloaded as Python itself is not compiled so, the C++ library because
# exceptions are watched; Python leaks on purpose, and a test asks for more memory than there is.
SANITIZE = $(MAKE) -s -f tests/native/sanitize.mk \
	TORCH_FOLDER=$$($(PY) -c 'import os, torch; print(os.path.dirname(torch.__file__))') \
	VERSION=$$($(PY) -c 'import runpy; print(runpy.run_path("bitorch_qlinear/_version.py")["__version__"])')
SANITIZED := build/sanitize/bitorch_qlinear
sanitize: build  ## run the standalone tests and the fuzz test under the compilers' sanitizers
	@for cxx in g++ clang++; do \
		command -v $$cxx >/dev/null || { echo "make: there is no $$cxx here: its sanitizers are left out."; continue; }; \
		$(SANITIZE) CXX=$$cxx SANITIZERS=address,undefined address || exit 1; \
		$(SANITIZE) CXX=$$cxx SANITIZERS=thread threads || exit 1; \
		echo "make: $$cxx: no sanitizer has anything to say"; \
	done
	@$(SANITIZE) CXX=g++ SANITIZERS=address,undefined library
	@mkdir -p $(SANITIZED)
	@ln -sfn $(CURDIR)/bitorch_qlinear/*.py $(CURDIR)/bitorch_qlinear/convert $(CURDIR)/bitorch_qlinear/_C*.so \
		$(CURDIR)/build/sanitize/g++-address-undefined/_ops_cpu.so $(SANITIZED)
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so.6)" PYTHONPATH=build/sanitize:tests \
	ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 $(PY) -m fuzz --cases 5000

# The kernels' own tests without torch: what they have in common with the library's build is the standard and the flags that
# results depend on.
NATIVE_SOURCES := tests/native/kernels.cpp $(filter-out %/exports.cpp,$(wildcard csrc/cpu/*.cpp))
NATIVE_FLAGS := -std=c++20 -O2 -g -Wall -Wextra -ffp-contract=off

# As it is, then watched for reads past an end and undefined behaviour, which an emulator does not see. Leaks are looked
# for by a debugger's means, which it does not offer.
neon:  ## test the NEON kernel in an emulator; wants g++-aarch64-linux-gnu and qemu-user
	@$(DIE); for tool in aarch64-linux-gnu-g++ qemu-aarch64; do command -v $$tool >/dev/null || \
		die "there is no $$tool: install it (Debian, Ubuntu: apt install g++-aarch64-linux-gnu qemu-user)."; done
	@mkdir -p build
	aarch64-linux-gnu-g++ $(NATIVE_FLAGS) -static -o build/kernels-neon $(NATIVE_SOURCES)
	qemu-aarch64 build/kernels-neon neon
	aarch64-linux-gnu-g++ $(NATIVE_FLAGS) -w -fsanitize=address,undefined -fno-sanitize-recover=all \
		-o build/kernels-neon-sanitized $(NATIVE_SOURCES)
	ASAN_OPTIONS=detect_leaks=0 qemu-aarch64 -L /usr/aarch64-linux-gnu build/kernels-neon-sanitized neon

simde:  ## test the AVX-512 kernel through SIMDe, on any x86-64 with AVX2; wants libsimde-dev
	@$(DIE); echo '#include <simde/x86/avx512.h>' | $(CXX) -E -x c++ - >/dev/null 2>&1 || \
		die "there is no SIMDe: install it (Debian, Ubuntu: apt install libsimde-dev)."
	@mkdir -p build
	for name in gemm sign_gemm; do \
		$(CXX) $(NATIVE_FLAGS) -w -DBITORCH_QLINEAR_SIMDE -Itests/native/simde -c -o build/$${name}_avx512-simde.o \
			csrc/cpu/$${name}_avx512.cpp || exit 1; \
	done
	$(CXX) $(NATIVE_FLAGS) -DBITORCH_QLINEAR_SIMDE -c -o build/kernels-simde.o tests/native/kernels.cpp
	$(CXX) $(NATIVE_FLAGS) -o build/kernels-simde build/kernels-simde.o build/*_avx512-simde.o \
		$(filter-out %/kernels.cpp %_avx512.cpp,$(NATIVE_SOURCES))
	build/kernels-simde

# bnn-lab's own needs include another torch.
benchmark: build  ## measure for some three minutes, and write the tables and plots of README.md and docs
	@$(PY) -c 'import bnn' 2>/dev/null || $(PIP) install --quiet --no-deps bnn-lab==1.0.0 || echo "make: going on without bnn-lab"
	$(PY) -m benchmarks tables --measure

benchmark-check: build  ## compare the committed figures with a fresh run
	$(PY) -m benchmarks check

lint: build  ## check style and types
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(CXX_SOURCES)

docs: build  ## build the pages of docs/ into build/docs; warnings are errors
	@$(PY) -c 'import furo, myst_parser' 2>/dev/null || $(PIP) install --quiet sphinx furo myst-parser
	$(PY) -m sphinx -W --keep-going -n -q -b html docs build/docs

format: build  ## rewrite the code in the style that lint checks
	$(PY) -m ruff check --select I --fix
	$(PY) -m ruff format
	$(VENV)/bin/clang-format -i $(CXX_SOURCES)

build: $(OPS) $(VENV)/installed  ## set up .venv and compile the extension

# Built for the GPUs that are here alone: a seventh of the time. The record of the build says so, and the next make builds
# for all again. Without a GPU the build is the usual one, so that what compiles is known. The 8 minutes begin before
# anything is set up.
gpu: START := $(shell date +%s)
gpu: $(VENV)/tools  ## build for the GPU here, test it and time it, in less than 8 minutes
	@$(DIE); targets=$$($(PY) -c "$$GPU_TARGETS") || die "torch does not import."; \
	test -n "$$targets" || { $(MAKE) -s build || exit 1; \
		why=$$($(PY) -c 'from bitorch_qlinear import _library; print(_library.no_cuda_reason)') || exit 1; \
		test -z "$$why" || die "nothing was run: there are no CUDA operators, because $$why."; \
		die "nothing was run: everything is built, and torch finds no NVIDIA GPU here."; }; \
	$(MAKE) build BITORCH_QLINEAR_BUILD_CUDA=1 TORCH_CUDA_ARCH_LIST="$$targets" || exit 1; \
	echo "make: set up and built for compute capability $$targets in $$(($$(date +%s) - $(START))) s"; \
	$(PY) -m benchmarks.gpu_run --results '$(RESULTS)' --start $(START)

# As TORCH_CUDA_ARCH_LIST wants them; only the "a" of 9.0a takes Hopper's own instructions.
define GPU_TARGETS
import torch
found = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())} if torch.cuda.is_available() else ()
print(" ".join(f"{major}.{minor}" + "a" * (major == 9) for major, minor in sorted(found)))
endef
export GPU_TARGETS

clean:  ## remove what was built (not .venv)
	rm -rf build dist *.egg-info bitorch_qlinear/*.so .coverage htmlcov .hypothesis .*_cache
	find . -path ./$(VENV) -prune -o -name __pycache__ -prune -exec rm -rf {} +

# Make compares times, not values: if a record says another configuration than today's, what it stands for is out of date
# whatever its time. The environment's record lies in it; that of the libraries lies beside them, because environments
# share a checkout (setup.py writes it at each build into the package, whoever calls it). A checksum of the sources is in
# it, for a copy that keeps times may bring others that are older. Python is named by its base, so that an activated .venv
# is the same one.
NAME_PYTHON := import sys, importlib.metadata as m; print(sys.base_prefix, *sys.version_info[:3]
NAME_PYTHON += $(if $(SYSTEM),$(comma) "system torch"$(comma) m.version("torch")))
VENV_CONFIG := $(strip $(shell $(PYTHON) -c '$(NAME_PYTHON)' 2>/dev/null) $(if $(SYSTEM),,$(TORCH) $(TORCH_INDEX)))
BUILD_CONFIG := CUDA=$(BITORCH_QLINEAR_BUILD_CUDA) CXX=$(if $(filter default,$(origin CXX)),,$(CXX)) \
	$(if $(TORCH_CUDA_ARCH_LIST),for $(TORCH_CUDA_ARCH_LIST))
CHECKSUM := $(shell find setup.py csrc -type f | LC_ALL=C sort | xargs cat | cksum)
export BITORCH_QLINEAR_BUILT_BY := $(strip $(VENV) $(VENV_CONFIG) $(BUILD_CONFIG) $(CHECKSUM))
ifneq ($(VENV_CONFIG),$(strip $(shell cat $(VENV)/config 2>/dev/null)))
.PHONY: $(VENV)/config
endif
ifneq ($(BITORCH_QLINEAR_BUILT_BY),$(strip $(shell cat build/built-by 2>/dev/null)))
.PHONY: $(OPS)
endif

# A torch that is not to be had must not cost the .venv that is there.
ifdef SYSTEM
CAN_INSTALL = error=$$($(PYTHON) -c 'import torch' 2>&1) || die "SYSTEM_TORCH=1 takes the torch of '$(PYTHON)', which does" \
	"not import ($$(echo "$$error" | tail -n 1)): name another PYTHON, or leave SYSTEM_TORCH out."
else
CAN_INSTALL = test ! -x $(PY) || $(PIP) install --quiet --dry-run --no-deps --ignore-installed \
	$(if $(TORCH_INDEX),--index-url '$(TORCH_INDEX)') '$(TORCH)' >/dev/null || \
	die "pip finds no '$(TORCH)': .venv stays as it is."
endif

# What is missing is said now, not after torch's download.
$(VENV)/config:
	@$(DIE); \
	$(PYTHON) -c '' 2>/dev/null || \
	die "'$(PYTHON)' does not run here: install Python 3.10 or later, or name one, as in 'make test PYTHON=/usr/bin/python3'."; \
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	die "'$(PYTHON)' is $$($(PYTHON) --version 2>&1): install Python 3.10 or later, or name one, as in 'make test PYTHON=python3.12'."; \
	$(PYTHON) -c 'import venv$(if $(SYSTEM),,$(comma) ensurepip)' 2>/dev/null || \
	die "'$(PYTHON)' has no venv module: install it (Debian, Ubuntu: apt install python3-venv)."; \
	command -v $${CXX:-c++} >/dev/null || { test -z "$$CXX" && { command -v g++ || command -v clang++; } >/dev/null; } || \
	die "there is no C++ compiler '$${CXX:-c++}': install one (Debian, Ubuntu: apt install g++) or name it in CXX."; \
	$(CAN_INSTALL); \
	echo "make: new .venv for $(VENV_CONFIG)"
ifdef SYSTEM
# PYTHON may be in an environment itself, whose packages --system-site-packages does not show: the .pth file does.
	@site=$$($(PYTHON) -c 'import sysconfig as s; print(s.get_path("purelib"), s.get_path("platlib"), sep="\n")') && \
	$(PYTHON) -m venv --clear --system-site-packages --without-pip $(VENV) && \
	echo "$$site" > "$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/system.pth"
else
	@$(PYTHON) -m venv --clear $(VENV)
endif
	@echo '$(VENV_CONFIG)' > $@

# torch first, in a step of its own: the build compiles against it, and its download is the long one.
# (numpy, which the tests want anyway, because torch warns at import without it.)
$(VENV)/tools: $(VENV)/config
ifdef SYSTEM
	$(PIP) install --retries 0 setuptools ninja pybind11
else
	$(PIP) install $(if $(TORCH_INDEX),--index-url '$(TORCH_INDEX)') '$(TORCH)'
	$(PIP) install --upgrade setuptools ninja pybind11 numpy
endif
	@touch $@

# setup.py itself rather than pip, which hides the compiler's output and the line about CUDA. csrc's folders are among
# the prerequisites: their time changes where a file comes or goes. The result is dated by the build's start, so that an
# edit made meanwhile is not lost.
$(OPS): $(VENV)/tools setup.py pyproject.toml bitorch_qlinear/_version.py bitorch_qlinear/_sources.py $(shell find csrc)
	@touch $(VENV)/build-start
	$(PY) setup.py -q build_ext --inplace
	@touch -r $(VENV)/build-start $@

$(VENV)/installed: $(VENV)/tools setup.py pyproject.toml bitorch_qlinear/_version.py | $(OPS)
ifdef SYSTEM
	$(PIP) install --no-deps --no-build-isolation -e .
	@$(PY) -c "$$LIST_MISSING"
else
	$(PIP) install --no-build-isolation -e '.[test,lint]'
endif
	@touch $@

define LIST_MISSING
import importlib.metadata as m, re, sys
norm = lambda name: re.sub("[-_.]+", "-", name).lower()
have = {norm(d.name) for d in m.distributions()}
missing = [r for r in m.requires("bitorch_qlinear") if norm(re.match("[\\w.-]+", r)[0]) not in have]
names = lambda of: ", ".join(sorted({re.match("[\\w.-]+", r)[0] for r in of}))
if needed := names(r for r in missing if "extra ==" not in r):
    sys.exit(f"make: the package needs {needed}: install it for '$(PYTHON)', or leave SYSTEM_TORCH out.")
if missing:
    print("make: going on without", names(missing), "(not there; some targets and tests need them)")
endef
export LIST_MISSING
