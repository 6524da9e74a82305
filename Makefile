# The only set-up a fresh machine needs: Python >= 3.10 and a C++17 compiler.
#   make demo ARGS="train.epochs=2"     overrides of the recipe
#   make test PYTHON=python3.12         the interpreter the environment is made from
#   make test WORKERS=8                 files of tests run in so many processes
PYTHON ?= python3
ARGS ?=
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml setup.py CMakeLists.txt constraints.txt $(wildcard csrc/*.h csrc/*.cpp)

.PHONY: demo test bench kernels sanitize lint format clean

demo: $(VENV)/.installed
	$(BIN)/crd-fast train recipes/shapes.yaml $(ARGS)

test: lint
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile

bench: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks.tables --require $(ARGS)

# Registers, spills and access widths of every Triton kernel, compiled without a GPU.
kernels: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks.compiled_kernels $(ARGS)

# The tests of the C++ operations on a build whose bad accesses and undefined behaviour abort. Python itself is not
# instrumented, so the sanitizer's runtime comes first and leaks, which Python's own start has, are not looked for.
SANITIZED := build/sanitize
SANITIZED_TESTS := tests/ops/test_native_noise.py tests/ops/test_native_residual.py tests/ops/test_objective.py \
  tests/ops/test_philox.py tests/forward/test_noise.py tests/didr/test_generator_ops_native.py
sanitize: $(VENV)/.installed-dev
	$(BIN)/cmake -S . -B $(SANITIZED) -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja -DCRD_SANITIZE=ON \
	  -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python -Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir)
	$(BIN)/cmake --build $(SANITIZED)
	LD_PRELOAD=$$($${CXX:-c++} -print-file-name=libasan.so):$$($${CXX:-c++} -print-file-name=libstdc++.so) \
	  ASAN_OPTIONS=detect_leaks=0 CRD_FAST_TEST_EXTENSION=$$(echo $(CURDIR)/$(SANITIZED)/_C.*.so) \
	  $(BIN)/python -m pytest -q -p no:cacheprovider $(SANITIZED_TESTS) $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy crd_fast

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
	rm -f crd_fast/_C.*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "'$(PYTHON)' is missing or older than Python 3.10; name a newer one: make PYTHON=/path/to/python3.12" >&2; \
	  exit 1; }
	$(PYTHON) -m venv $(VENV)

# torch comes in a call of its own, so that no other requirement can choose its version or build.
$(VENV)/.torch: constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -c constraints.txt torch==2.13.0
	touch $@

$(VENV)/.installed: $(SOURCES) $(VENV)/.torch
	$(BIN)/python -m pip install -c constraints.txt -e ".[train,rewards]"
	touch $@

$(VENV)/.installed-dev: $(SOURCES) $(VENV)/.torch
	$(BIN)/python -m pip install -c constraints.txt -e ".[train,rewards,serve,dev]"
	touch $(VENV)/.installed $@
