# Tests the kernels without torch, under emulators, and with the compilers' sanitizers. `make neon`, `make simde` and
# `make sanitize` call this file from the checkout; PY is the Python of an environment in which the extension is built.

DIE := die() { echo "make: $$*" >&2; exit 1; }
# The language and the flags that results depend on are those of the library's build.
SOURCES := tests/native/kernels.cpp $(filter-out %/exports.cpp,$(wildcard csrc/cpu/*.cpp))
FLAGS := -std=c++20 -O2 -g -Wall -Wextra -ffp-contract=off

.PHONY: neon simde sanitize

# Sanitizers watch the second program for reads past an end and undefined behaviour, which an emulator does not report.
# The search for leaks is off, because the emulator does not offer the system call that it uses.
neon:
	@$(DIE); for tool in aarch64-linux-gnu-g++ qemu-aarch64; do command -v $$tool >/dev/null || \
		die "there is no $$tool: install it (Debian, Ubuntu: apt install g++-aarch64-linux-gnu qemu-user)."; done
	@mkdir -p build
	aarch64-linux-gnu-g++ $(FLAGS) -static -o build/kernels-neon $(SOURCES)
	qemu-aarch64 build/kernels-neon neon
	aarch64-linux-gnu-g++ $(FLAGS) -w -fsanitize=address,undefined -fno-sanitize-recover=all \
		-o build/kernels-neon-sanitized $(SOURCES)
	ASAN_OPTIONS=detect_leaks=0 qemu-aarch64 -L /usr/aarch64-linux-gnu build/kernels-neon-sanitized neon

# SIMDe takes the place of the AVX-512 intrinsics in the files that use them; its own warnings are switched off.
AVX512 := $(wildcard csrc/cpu/*_avx512.cpp)
simde:
	@$(DIE); echo '#include <simde/x86/avx512.h>' | $(CXX) -E -x c++ - >/dev/null 2>&1 || \
		die "there is no SIMDe: install it (Debian, Ubuntu: apt install libsimde-dev)."
	@mkdir -p build
	@rm -f build/*_avx512-simde.o
	for source in $(AVX512); do \
		$(CXX) $(FLAGS) -w -DBITORCH_QLINEAR_SIMDE -Itests/native/simde -c -o build/$$(basename $$source .cpp)-simde.o \
			$$source || exit 1; \
	done
	$(CXX) $(FLAGS) -DBITORCH_QLINEAR_SIMDE -c -o build/kernels-simde.o tests/native/kernels.cpp
	$(CXX) $(FLAGS) -o build/kernels-simde build/kernels-simde.o build/*_avx512-simde.o \
		$(filter-out tests/native/kernels.cpp $(AVX512),$(SOURCES))
	build/kernels-simde

# The compilers' sanitizers see the standalone tests; those of gcc also see the operators while they are fuzzed. The
# fuzzed package is the usual one with other operators. gcc's libraries are preloaded because Python itself is not
# compiled with them, and the C++ library because the sanitizer watches exceptions. Python leaks on purpose, and one
# test asks for more memory than the machine has.
SANITIZE = $(MAKE) -s -f tests/native/sanitize.mk \
	TORCH_FOLDER=$$($(PY) -c 'import os, torch; print(os.path.dirname(torch.__file__))') \
	VERSION=$$($(PY) -c 'import runpy; print(runpy.run_path("bitorch_qlinear/_version.py")["__version__"])')
SANITIZED := build/sanitize/bitorch_qlinear
sanitize:
	@for cxx in g++ clang++; do \
		command -v $$cxx >/dev/null || { echo "make: there is no $$cxx here: its sanitizers are left out."; continue; }; \
		$(SANITIZE) CXX=$$cxx SANITIZERS=address,undefined address || exit 1; \
		$(SANITIZE) CXX=$$cxx SANITIZERS=thread threads || exit 1; \
		echo "make: $$cxx: no sanitizer found anything"; \
	done
	@$(SANITIZE) CXX=g++ SANITIZERS=address,undefined library
	@rm -rf $(SANITIZED)
	@mkdir -p $(SANITIZED)
	@ln -s $(filter-out %.so %/__pycache__,$(wildcard $(CURDIR)/bitorch_qlinear/*)) \
		$(wildcard $(CURDIR)/bitorch_qlinear/_C*.so) $(CURDIR)/build/sanitize/g++-address-undefined/_ops_cpu.so $(SANITIZED)
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so.6)" PYTHONPATH=build/sanitize:tests \
	ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 $(PY) -m fuzz --cases 5000
