# Everything runs in .venv, which the first target that needs it creates. `make help` lists them.
#
#   make PYTHON=python3.12 demo      another Python, 3.11 or newer
#   PIP_EXTRA_INDEX_URL=URL make demo   another package index too, such as PyTorch's CPU builds

PYTHON ?= python3
# The extra for the GPU's kernels: empty without an NVIDIA driver.
CUDA := $(shell nvidia-smi 2>/dev/null | sed -n 's/.*CUDA Version: *\(1[23]\)\..*/cuda\1/p' | head -1)
COMMA := ,
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable

.DEFAULT_GOAL := help
.PHONY: help demo test lint format wheel clean

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 16

demo: .venv/installed-run  ## show what qtool does, on a model that ships with it
	$(BIN)/qtool demo

test: lint  ## lint, then run the tests
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal

lint: .venv/installed-test  ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/installed-test  ## rewrite the code in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel: .venv/installed-run  ## build the wheel into dist/
	$(BIN)/python -m pip wheel --no-deps --wheel-dir dist .

clean:  ## remove what the other targets made
	rm -rf .venv dist .mypy_cache .pytest_cache .ruff_cache .hypothesis

# The files .venv/installed-run and .venv/installed-test stand for finished installations.
.venv/installed-run: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11)' 2>/dev/null \
		|| { echo "$(PYTHON) is no Python >= 3.11; name one: make PYTHON=python3.12"; exit 1; }
	@echo "installing qtool[run$(CUDA:%=$(COMMA)%)] into .venv; the first time takes a few minutes"
	$(PYTHON) -m venv .venv
	$(INSTALL) ".[run$(CUDA:%=$(COMMA)%)]"
	@touch $@

.venv/installed-test: .venv/installed-run
	$(INSTALL) ".[run,finetune,test,$(or $(CUDA),cuda13)]"  # the tests compile the kernels on any machine
	@touch $@
