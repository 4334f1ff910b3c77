# `make help` lists the targets.
#
# PYTHON         the interpreter that .venv is made from
# ARGS           arguments of demo and bench
# TESTS          what pytest runs: paths, -k ...
# WORKERS        pytest processes
# REQUIRE_CPP    1: a failed build of the C++ extension is an error; 0: Numba serves then; empty: 1, if there is a Python.h

PYTHON      ?= python3
ARGS        ?=
TESTS       ?=
WORKERS     ?= 2
REQUIRE_CPP ?=
CXX         ?= g++

VENV  := .venv
RUN   := $(VENV)/bin/python
READY := $(VENV)/ready
DOWNSTREAM := .venv-downstream
CSRC  := $(wildcard csrc/*.* csrc/*/*.*)
# What the C++ cells are written from.
CELLS := $(wildcard fused_rnn/cells/*.py) fused_rnn/data/cell.py fused_rnn/kernels/written.py $(wildcard fused_rnn/kernels/cpp/*.py)
CPP   := $(filter %.h %.hpp %.inl %.cpp,$(CSRC)) $(wildcard tests/cpp/*.h tests/cpp/*.cpp)
PY    := fused_rnn tests benchmarks setup.py

.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: demo test test-extended test-downstream bench lint format sanitize setup clean help

demo: setup ## train the language model with torch.nn and with fused_rnn
	$(RUN) -m benchmarks.training.language_model $(ARGS)

# By file, so that what a file builds or Numba compiles for it is made once, and in the order of tests/conftest.py.
test: setup ## run the tests
	$(RUN) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(TESTS)

# FUSED_RNN_TRITON_DRAWN: of the Triton kernels that the heuristic may choose, how many are compiled for each chip.
test-extended: setup ## draw some thousand mixtures of arguments, some hundred Triton kernels (half an hour)
	FUSED_RNN_TRITON_DRAWN=100 $(RUN) -m pytest -n $(WORKERS) tests/kernels/test_properties.py tests/kernels/test_triton_sm80.py \
		tests/kernels/test_triton_sm90.py --hypothesis-profile extended $(TESTS)

test-downstream: $(DOWNSTREAM)/ready ## train programs of others with torch.nn and with fused_rnn
	$(DOWNSTREAM)/bin/python -m pytest $(or $(TESTS),tests/downstream)

# An environment beside .venv that reads what .venv has, torch above all, and adds what the tests of others' programs need. pip
# counts what it finds there as installed, fused_rnn too, and leaves it alone; torch is named, so that no other one comes along.
$(DOWNSTREAM)/ready: pyproject.toml | setup
	@echo "make: installing the programs of others in $(DOWNSTREAM)" >&2
	$(RUN) -m venv --clear --without-pip $(DOWNSTREAM)
	@site='import sysconfig; print(sysconfig.get_path("purelib"))'; \
	$(RUN) -c "$$site" >"$$($(DOWNSTREAM)/bin/python -c "$$site")/venv.pth"
	$(RUN) -m pip --python $(DOWNSTREAM)/bin/python install --disable-pip-version-check 'fused_rnn[downstream]' \
		"torch==$$($(RUN) -c 'import torch; print(torch.__version__)')"
	@touch $@

bench: setup ## print the benchmark's table
	$(RUN) -m benchmarks $(ARGS)

lint: setup ## ruff, mypy and clang-format, changing nothing
	$(RUN) -m ruff check $(PY)
	$(RUN) -m ruff format --check $(PY)
	$(RUN) -m mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(CPP)

format: setup ## let ruff and clang-format rewrite the sources
	$(RUN) -m ruff check --fix $(PY)
	$(RUN) -m ruff format $(PY)
	$(VENV)/bin/clang-format -i $(CPP)

setup: $(READY) ## make .venv and build the extension

# With a changed pyproject.toml everything is installed again, else the extension alone is rebuilt.
$(READY): pyproject.toml setup.py $(CSRC) $(CELLS) | $(RUN)
	@require='$(REQUIRE_CPP)'; \
	if [ -z "$$require" ] && ! [ -f "$$($(RUN) -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" ]; then \
		require=0; \
		echo "make: WARNING: Python.h is missing, so the C++ kernels are not built and Numba serves." >&2; \
		echo "make: WARNING: Install it (Debian: apt install python3-dev), remove $@ and run make again." >&2; \
	fi; \
	echo "make: building the extension$(if $(filter pyproject.toml,$?), and installing what $(VENV) needs); this takes a minute" >&2; \
	FUSED_RNN_REQUIRE_CPP=$${require:-1} $(RUN) -m pip install --disable-pip-version-check \
		$(if $(filter pyproject.toml,$?),-e '.[dev]',-q --no-deps --no-build-isolation -e .)
	@touch $@

# A Python without ensurepip (Debian without python3-venv) may still have a pip of its own that can fill the environment.
$(RUN):
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) not found; set PYTHON= to a Python 3.10 or newer" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "make: Python 3.10 or newer is needed, $(PYTHON) is $$($(PYTHON) --version 2>&1); set PYTHON=" >&2; exit 1; }
	@if $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null; then \
		$(PYTHON) -m venv $(VENV); \
	elif $(PYTHON) -c 'import pip, venv' 2>/dev/null; then \
		$(PYTHON) -m venv --without-pip $(VENV) && $(PYTHON) -m pip --python $(VENV)/bin/python install -q pip || \
			{ rm -rf $(VENV); exit 1; }; \
	else \
		echo "make: $(PYTHON) cannot make a virtual environment; install python3-venv (Debian: apt install python3-venv)" >&2; \
		exit 1; \
	fi

# The sanitizers see a driver of its own, without Python. One build for each instruction set that this machine has; the flags
# are those of setup.py.
SANITIZE_DIR := build/sanitize
SANITIZE_CXX := $(CXX) -std=c++17 -O1 -g -fno-omit-frame-pointer -Wno-psabi -Icsrc -Ibuild/generated
CPU_FLAGS    := $(shell grep -m1 '^flags' /proc/cpuinfo 2>/dev/null)
ISAS         := baseline $(if $(filter avx2,$(CPU_FLAGS)),avx2) $(if $(filter avx512bw,$(CPU_FLAGS)),avx512)

SANITIZE_SRC := tests/cpp/sanitize.cpp $(wildcard csrc/run/*.cpp)

ISA_baseline :=
ISA_avx2     := -mavx2 -mfma -mf16c
ISA_avx512   := -mavx512f -mavx512dq -mavx512bw -mavx512vl -mfma -mf16c -mprefer-vector-width=512

# ThreadSanitizer cannot see the barriers inside libgomp and would report every one, so its build starts std::threads.
WITH_memory  := -fopenmp -fsanitize=address,undefined -fno-sanitize-recover=all
WITH_threads := -pthread -DFUSED_RNN_STD_THREADS -fsanitize=thread

sanitize: $(foreach isa,$(ISAS),$(SANITIZE_DIR)/memory-$(isa).ok $(SANITIZE_DIR)/threads-$(isa).ok) ## run the kernels under ASan, UBSan and TSan

$(SANITIZE_DIR)/%.ok: $(SANITIZE_DIR)/%
	ASAN_OPTIONS=detect_leaks=1 UBSAN_OPTIONS=print_stacktrace=1 TSAN_OPTIONS=halt_on_error=1 $<
	@touch $@

# Made anew only where it would differ, so that what is built of it stays.
build/generated/cells/equations.h: setup.py $(CELLS) $(READY)
	$(RUN) setup.py -q write_cells

define SANITIZE_RULE
$(SANITIZE_DIR)/$(1)-$(2): $(wildcard tests/cpp/*) $(CSRC) build/generated/cells/equations.h Makefile
	@mkdir -p $$(@D)
	$(SANITIZE_CXX) -DFUSED_RNN_ISA=$(2) $(ISA_$(2)) $(WITH_$(1)) $(SANITIZE_SRC) -o $$@
endef
$(foreach isa,$(ISAS),$(foreach kind,memory threads,$(eval $(call SANITIZE_RULE,$(kind),$(isa)))))

clean: ## remove what was built, .venv included
	rm -rf $(VENV) $(DOWNSTREAM) build dist *.egg-info fused_rnn/_C*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks benchmarks/out

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1|\2/p' Makefile | awk -F'|' '{ printf "  %-20s %s\n", $$1, $$2 }'
	@sed -n 's/^# \([A-Z_]\{2,\} .*\)/  \1/p' Makefile
