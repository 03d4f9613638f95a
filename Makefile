# This file is a menu: each target sets up what it needs (.venv, torch, other packages, the compiled extension) through
# tools/environment.py, which takes a moment once that is done. `make help` lists the targets and the choices.

PYTHON ?= python3
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
SYSTEM_TORCH ?=
ARGS ?=
RESULTS ?= benchmarks/results/gpu

VENV := .venv
PY := $(VENV)/bin/python
# The shell checks the version of PYTHON, because an older Python cannot parse the program.
DIE := die() { echo "make: $$*" >&2; exit 1; }
SETUP = $(DIE); $(PYTHON) -c '' 2>/dev/null || \
	die "'$(PYTHON)' does not run here: install Python 3.10 or later, or name one, as in 'make test PYTHON=/usr/bin/python3'."; \
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	die "'$(PYTHON)' is $$($(PYTHON) --version 2>&1): install Python 3.10 or later, or name one, as in 'make test PYTHON=python3.12'."; \
	$(PYTHON) tools/environment.py --python '$(PYTHON)' --venv '$(VENV)' --torch '$(TORCH)' --index '$(TORCH_INDEX)' \
	--system-torch '$(SYSTEM_TORCH)'
CXX_FILES = $(shell find csrc benchmarks tests tools $(wildcard examples) -name __pycache__ -prune -o -name '*.cpp' -print \
	-o -name '*.h' -print -o -name '*.cu' -print -o -name '*.cuh' -print)
NATIVE = $(MAKE) -s -f tests/native/native.mk PY='$(abspath $(PY))'

.PHONY: help demo test check lint format docs benchmark benchmark-check gpu fuzz sanitize neon simde ptx-full ptx-report \
	build clean
# Targets run one after the other, because they set up the same environment.
.NOTPARALLEL:

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):[^#]*## /\1 /p' Makefile | \
	while read target what; do printf '  make %-15s %s\n' $$target "$$what"; done
	@echo 'Choices, as in "make test TORCH=torch==2.14.1":'
	@echo '  PYTHON=python3             the Python that .venv is made from, 3.10 or later'
	@echo '  TORCH=torch==2.13.0        the torch to install'
	@echo '  TORCH_INDEX=URL            the index that torch comes from, such as https://download.pytorch.org/whl/cpu'
	@echo '  SYSTEM_TORCH=1             use the torch and packages that PYTHON has; needs no network'
	@echo '  BITORCH_QLINEAR_BUILD_CUDA=0|1  without or with CUDA operators; by default the build decides and says why'
	@echo '  ARGS="-k pack"             arguments for pytest or the demo'
	@echo '  RESULTS=FOLDER             the folder that make gpu writes ($(RESULTS))'

demo:  ## train, pack and time a binarized classifier
	@$(SETUP) demo
	$(PY) -m examples.digits $(ARGS)
test:  ## run all tests, with coverage
	@$(SETUP) test
	$(PY) -m pytest $$($(PY) tools/environment.py pytest-options -- $(ARGS)) $(ARGS)
check:  ## lint and one quick case of each test, in less than a minute; of the PTX tests only those of popc
	@$(SETUP) check
	@$(MAKE) -s lint
	$(PY) -m pytest -q -r fE $$($(PY) tools/environment.py parallel-options) --quick --ignore-glob='*/test_ptx_[!p]*' --ignore-glob='*/test_ptx_pack*' tests
docs:  ## build the pages of docs/ into build/docs; warnings are errors
	@$(SETUP) docs
	$(PY) -m sphinx -W --keep-going -n -q -b html docs build/docs $(ARGS)
lint:  ## check style and types
	@$(SETUP) lint
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy
	@$(VENV)/bin/clang-format --dry-run -Werror $(CXX_FILES)
format:  ## rewrite the code in the style that lint checks
	@$(SETUP) lint
	$(PY) -m ruff check --select I --fix
	$(PY) -m ruff format
	@$(VENV)/bin/clang-format -i $(CXX_FILES)
benchmark:  ## measure for some six minutes and write the tables and plots of README.md and docs
	@$(SETUP) benchmark
	@$(PY) -c 'import bnn' 2>/dev/null || $(PY) -m pip install -q --no-deps bnn-lab==1.0.0 || echo "make: going on without bnn-lab"
	$(PY) -m benchmarks tables --measure
benchmark-check:  ## compare the committed figures with a fresh run
	@$(SETUP) benchmark
	$(PY) -m benchmarks check
gpu:  ## build for the GPU here, test it and time it, in less than 8 minutes
	@start=$$(date +%s); ($(SETUP) gpu) && $(PY) -m tools.gpu_run --results '$(RESULTS)' --start $$start
fuzz:  ## call the operators with 100,000 sets of hostile arguments
	@$(SETUP) test
	PYTHONPATH=tests $(PY) -m fuzz $(or $(ARGS),--cases 100000)
sanitize:  ## run the standalone tests and the fuzz test under the compilers' sanitizers
	@$(SETUP) test
	@$(NATIVE) sanitize
neon simde:
	@$(NATIVE) $@
neon:  ## test the NEON kernel in an emulator; needs g++-aarch64-linux-gnu and qemu-user
simde:  ## test the AVX-512 kernels through SIMDe, on any x86-64 with AVX2; needs libsimde-dev
ptx-full:  ## run the CUDA kernels' PTX of all targets on many more shapes, for half an hour or more; needs nvcc
	@$(SETUP) test
	PTX_FULL=1 $(PY) -m pytest $$($(PY) tools/environment.py parallel-options) tests/ptx $(ARGS)
ptx-report:  ## count what the CUDA kernels' PTX does with memory; needs nvcc
	@$(SETUP) test
	CI=true PYTHONPATH=tests $(PY) -m ptx.report
build:  ## set up .venv and compile the extension
	@$(SETUP) build
clean:  ## remove what was built (not .venv)
	rm -rf build dist *.egg-info bitorch_qlinear/*.so .coverage htmlcov .hypothesis .*_cache
	find . -path './.venv*' -prune -o -name __pycache__ -prune -exec rm -rf {} +
