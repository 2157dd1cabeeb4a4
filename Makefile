# Every target makes what it needs first: the virtual environment (.venv), the build (build/dev), the libraries in nsa_ext/.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c

PYTHON ?= python3
SUITE ?= cpu
BASE ?= main
export PATH := $(CURDIR)/.venv/bin:$(PATH)

SETUP := .venv/.bootstrapped
CONFIGURED := build/dev/build.ninja
CXX_FILES = $(shell find csrc tests/cpp cmake -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: setup build test test-cpp test-gpu fuzz lint format bench compare sanitize sanitize-gpu ptxas demo wheel clean

setup: $(SETUP)

$(SETUP): tools/bootstrap.sh pyproject.toml
	PYTHON=$(PYTHON) tools/bootstrap.sh

$(CONFIGURED): $(SETUP)
	cmake -S . -B build/dev -G Ninja -DNSA_PYTHON=$(CURDIR)/.venv/bin/python -DNSA_TESTS=ON

build: $(CONFIGURED)
	cmake --build build/dev --target nsa_ops _C
	cmake --install build/dev --prefix . --component python

test: test-cpp
	python -m pytest

test-cpp: build
	cmake --build build/dev
	cd build/dev && ctest --output-on-failure

# Both CUDA paths, in C++ and in Python.
test-gpu: build
	cmake --build build/dev --target nsa_cuda_tests
	build/dev/nsa_cuda_tests
	python -m pytest -m gpu

# 500 random shapes against the reference, in bounded time: on the GPU, or on the CPU where there is none.
fuzz: build
	python tests/fuzz.py

lint: $(SETUP)
	ruff check .
	ruff format --check .
	clang-format --dry-run -Werror $(CXX_FILES)
	python tools/check_layering.py

format: $(SETUP)
	ruff check --fix .
	ruff format .
	clang-format -i $(CXX_FILES)

bench: build
	mkdir -p runs
	python benchmarks/run.py --suite $(SUITE) --json runs/bench-$(SUITE).json

compare: build
	python benchmarks/compare.py --base $(BASE) --suite $(SUITE)

# Needs neither torch nor .venv.
sanitize:
	cmake -S . -B build/sanitize -DNSA_TORCH=OFF -DNSA_SANITIZE=ON -DNSA_TESTS=ON
	cmake --build build/sanitize --parallel $$(nproc)
	cd build/sanitize && ctest --output-on-failure

sanitize-gpu: build
	cmake --build build/dev --target nsa_cuda_tests
	python tools/sanitize.py

# Needs nvcc, but no GPU and no torch. From clean, because only a compilation shows what ptxas says; ccache repeats it.
ptxas:
	cmake -S . -B build/ptxas -G "Unix Makefiles" -DNSA_TORCH=OFF -DNSA_CUDA=ON
	cmake --build build/ptxas --target nsa_cuda --clean-first --parallel $$(nproc) -- -Otarget 2>&1 | tee build/ptxas/ptxas.log
	$(PYTHON) tools/ptxas_report.py build/ptxas/ptxas.log

demo: build
	python examples/demo.py

wheel: $(SETUP)
	python -m pip wheel . --no-build-isolation --no-deps --wheel-dir dist

clean:
	rm -rf build dist *.egg-info nsa_ext/*.so nsa_ext/_built_with.py
