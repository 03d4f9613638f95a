# Builds and runs the standalone tests, and builds the operators' library, with one compiler's sanitizers. `make
# sanitize` calls this file for each compiler and kind of sanitizer:
#
#     make -f tests/native/sanitize.mk CXX=g++ SANITIZERS=address,undefined TORCH_FOLDER=.../torch VERSION=0.1.0 address

SANITIZERS := address,undefined
comma := ,
FOLDER := build/sanitize/$(notdir $(CXX))-$(subst $(comma),-,$(SANITIZERS))
KERNELS := $(patsubst %.cpp,$(FOLDER)/%.o,$(filter-out %/exports.cpp,$(wildcard csrc/cpu/*.cpp)))
# Warnings are off because sanitizers cause false ones; the library's own build has none.
FLAGS := -std=c++20 -O1 -g -fPIC -fvisibility=hidden -ffp-contract=off -w \
	-fsanitize=$(SANITIZERS) -fno-sanitize-recover=all -fno-omit-frame-pointer \
	-DTORCH_TARGET_VERSION=0x020a000000000000 -DBITORCH_QLINEAR_VERSION='"$(VERSION)"' -isystem $(TORCH_FOLDER)/include
LINK = $(CXX) -fsanitize=$(SANITIZERS) $^ -o $@
WITH_TORCH = -L$(TORCH_FOLDER)/lib -ltorch_cpu -Wl,-rpath,$(abspath $(TORCH_FOLDER)/lib)

.PHONY: address threads library
.SECONDARY:
address: $(FOLDER)/kernels $(FOLDER)/checks
	$(FOLDER)/kernels
	$(FOLDER)/checks
threads: $(FOLDER)/threads
	$(FOLDER)/threads
library: $(FOLDER)/_ops_cpu.so

# csrc/sources.cpp includes a header that the build of the package has generated.
$(FOLDER)/csrc/sources.o: FLAGS += -Ibuild/generated

$(FOLDER)/%.o: %.cpp
	@mkdir -p $(@D)
	$(CXX) $(FLAGS) -MMD -c $< -o $@
$(FOLDER)/kernels $(FOLDER)/threads: $(FOLDER)/%: $(FOLDER)/tests/native/%.o $(KERNELS)
	$(LINK) -pthread
$(FOLDER)/checks: $(FOLDER)/tests/native/checks.o $(FOLDER)/csrc/torch/ops.o $(FOLDER)/csrc/sources.o $(KERNELS)
	$(LINK) $(WITH_TORCH) -pthread
$(FOLDER)/_ops_cpu.so: $(FOLDER)/csrc/torch/ops.o $(FOLDER)/csrc/torch/ops_cpu.o $(FOLDER)/csrc/cpu/exports.o $(FOLDER)/csrc/sources.o $(KERNELS)
	$(LINK) $(WITH_TORCH) -shared

-include $(shell find $(FOLDER) -name '*.d' 2>/dev/null)
