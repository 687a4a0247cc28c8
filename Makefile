# Everything from nothing: each target makes the virtual environment, installs what it needs and builds, then does its
# work. Needed beforehand: Python 3.11 or newer with venv, a C++17 compiler, make.
#
#   make demo                                 torch from the default package index
#   make demo TORCH=2.10.0                    another torch
#   make demo TORCH_INDEX=URL                 torch from another index, such as PyTorch's own of CPU builds, which
#                                             spares the download of CUDA libraries
#   make wheel CUDA=cu130 TORCH=2.11.0        localattn_cu130-...+torch2.11-...whl, with the nvcc that CUDACXX names
#   make wheel TORCH="2.4.1 2.10.0 2.13.0"    localattn_cpu-...whl, which serves each of these
PYTHON ?= python3
TORCH ?= 2.13.0
TORCH_INDEX ?=
CUDA ?= cpu
PIP_FLAGS ?=
VENV ?= .venv
JOBS ?= $(shell nproc 2>/dev/null || echo 2)
ARGS ?=

BIN := $(abspath $(VENV))/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install --quiet --constraint constraints.txt $(PIP_FLAGS)
# The working directory stays off sys.path: what runs is the installed package, not the source tree.
export PYTHONSAFEPATH := 1
export CMAKE_GENERATOR ?= Ninja
export CMAKE_BUILD_PARALLEL_LEVEL ?= $(JOBS)
export PATH := $(BIN):$(PATH)

TOOLS := $(VENV)/.tools-torch$(TORCH)
CPP_SOURCES = $(shell find core bindings tests examples -name '*.[ch]' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' \
    2>/dev/null)

.DEFAULT_GOAL := help
.PHONY: help demo test test-core test-sanitizers test-machine-code test-python bench wheel test-wheel docs lint format install clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: install  ## train a small denoiser on photographs, write localattn-demo.png, compare with plain unfold
	$(INSTALL) --group demo
	$(BIN)/python -m localattn demo $(ARGS)

test: test-core test-sanitizers test-python  ## every test: C and C++, sanitizers, Python

test-core: $(TOOLS)  ## the C and C++ tests, warnings as errors
	cmake --preset dev
	cmake --build --preset dev
	ctest --preset dev

test-sanitizers: $(TOOLS)  ## the C and C++ tests under ASan and UBSan, concurrent calls under TSan
	cmake --preset asan
	cmake --build --preset asan
	ctest --preset asan
	cmake --preset tsan
	cmake --build --preset tsan --target test_workers
	ctest --preset tsan --label-regex threads

test-machine-code: $(TOOLS)  ## the CUDA kernels compiled for every architecture, and their machine code; needs nvcc
	@if ! command -v $${CUDACXX:-nvcc} >/dev/null; then echo "not run: $${CUDACXX:-nvcc} was not found"; else \
	set -ex; $(INSTALL) --group machine-code; \
	cmake -S . -B build/cuda -DCMAKE_BUILD_TYPE=Release -DLOCALATTN_CUDA=ON -DLOCALATTN_WERROR=ON; \
	cmake --build build/cuda --target localattn_cuda; \
	$(BIN)/python tests/cuda/check_machine_code.py build/cuda/core/liblocalattn_cuda.so; fi

test-python: install  ## the Python tests, against the installed package
	$(INSTALL) --group test
	$(BIN)/pytest -n 2 tests/python $(ARGS)

bench: install  ## speed and memory against every peer that is installed; ARGS=--quick takes two minutes
	$(INSTALL) --group demo
	$(BIN)/python -m localattn bench $(ARGS)

wheel: $(VENV)/.wheel  ## dist/*.whl for other machines: CUDA=cpu, cu130 and so on; TORCH="2.10.0 2.13.0"
	rm -rf build/wheel dist
	roots=$$($(if $(TORCH_INDEX),PIP_INDEX_URL=$(TORCH_INDEX)) \
	    $(BIN)/python packaging/fetch_torch.py --into build/torch $(TORCH)) && \
	$(PIP) wheel --no-deps --no-build-isolation --wheel-dir build/wheel $(PACKAGE_SETTINGS) \
	    -Cdistribution=localattn-$(CUDA) $(if $(word 2,$(TORCH)),,-Clocal=torch$(basename $(TORCH))) \
	    -Ccmake.define.LOCALATTN_CUDA=$(if $(filter cpu,$(CUDA)),OFF,ON) \
	    -Ccmake.define.LOCALATTN_TORCH_ROOTS="$$roots" -Ccmake.define.LOCALATTN_MANYLINUX=ON .
	$(BIN)/python packaging/repair.py build/wheel/*.whl --into dist

# Beside the tests of the package itself, a few of everything: they were all run against the same sources already.
WHEEL_TESTS = test_package test_loading test_examples test_errors test_golden
test-wheel:  ## install dist/*.whl and torch TORCH in an empty environment, and test what is installed there
	rm -rf build/wheel-test
	$(PYTHON) -m venv build/wheel-test
	build/wheel-test/bin/python -m pip install --quiet --constraint constraints.txt $(PIP_FLAGS) pip
	build/wheel-test/bin/python -m pip install --quiet $(PIP_FLAGS) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) \
	    torch==$(firstword $(TORCH))
	build/wheel-test/bin/python -m pip install --quiet --constraint constraints.txt $(PIP_FLAGS) dist/*.whl \
	    --group build --group test
	cd build/wheel-test && bin/python -m localattn info
	cd build/wheel-test && PATH=$(abspath build/wheel-test/bin):$(PATH) bin/python -m pytest -n 2 --rootdir ../.. \
	    -c ../../pyproject.toml $(WHEEL_TESTS:%=../../tests/python/%.py) $(ARGS)
	cd build/wheel-test && LOCALATTN_BINDING=c-api bin/python -m pytest -n 2 --rootdir ../.. \
	    -c ../../pyproject.toml ../../tests/python/test_errors.py ../../tests/python/test_golden.py $(ARGS)

docs: install  ## the documentation as a site, warnings as errors
	$(INSTALL) --group docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

lint: $(VENV)/.lint  ## formatting and static checks
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CPP_SOURCES)
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml

format: $(VENV)/.lint  ## put C++ and Python into the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_SOURCES)

clean:  ## remove everything that make has made
	rm -rf $(VENV) build dist site localattn-demo.png localattn-bench

# The package is built in one place, whatever for, so that only what changed is compiled again.
PACKAGE_SETTINGS = -Cbuild-dir=build/package-$(CUDA) -Ccmake.define.LOCALATTN_WERROR=ON

# The package, built against this torch and installed.
install: $(TOOLS)
	$(INSTALL) --no-build-isolation $(PACKAGE_SETTINGS) -Ccmake.define.LOCALATTN_TORCH_ROOTS= \
	    -Ccmake.define.LOCALATTN_MANYLINUX=OFF .

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and \
	    f"{sys.executable} is Python {v.major}.{v.minor}; 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) pip

$(TOOLS): $(VENV)/bin/python constraints.txt
	@command -v $${CXX:-c++} >/dev/null || { echo "no C++ compiler: install g++ or clang, or set CXX"; exit 1; }
	$(PIP) install --quiet $(PIP_FLAGS) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch==$(TORCH)
	$(INSTALL) --group build
	@touch $@

$(VENV)/.wheel: $(VENV)/bin/python constraints.txt
	$(INSTALL) --group build --group wheel
	@touch $@

$(VENV)/.lint: $(VENV)/bin/python constraints.txt
	$(INSTALL) --group lint
	@touch $@
