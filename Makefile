# `make demo` and `make test` are all a newcomer needs; each sets up .venv first.
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO_OUT ?= out/demo
# threads that wait without spinning: on a busy machine two spinning ones are five times slower than one
export OMP_WAIT_POLICY ?= PASSIVE

help: ## what there is
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1	\2/p' $(MAKEFILE_LIST)

$(STAMP): pyproject.toml .ci/constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "moesparse needs Python >= 3.11, got " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint .ci/constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint .ci/constraints.txt --editable '.[dev]'
	touch $@

demo: $(STAMP) ## prune the embedded model six ways and compare
	rm -rf $(DEMO_OUT)
	$(BIN)/moesparse demo --output $(DEMO_OUT)

test: $(STAMP) ## all tests that need no GPU
	$(BIN)/python -m pytest tests

# what is installed is used as it is: a GPU machine may have no network
gpu: ## GPU tests, benchmarks, figures: PART="tests decode ..." SHAPES=... AGAIN=1; DRY=1 without a GPU
	PYTHONPATH=.:kernels:$(PYTHONPATH) $(or $(wildcard $(BIN)/python),$(PYTHON)) -m benchmarks.gpu \
		$(if $(PART),--parts $(PART)) $(if $(SHAPES),--shapes $(SHAPES)) $(if $(AGAIN),--again) \
		$(if $(DRY),--dry --results $(or $(RESULTS),out/gpu-dry-run),$(if $(RESULTS),--results $(RESULTS)))

lint: $(STAMP) ## ruff, mypy, import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP) ## ruff's fixes and layout
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove what the targets made
	rm -rf $(VENV) out build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

.PHONY: help demo test gpu lint format clean
