# `make demo` and `make test` set up .venv themselves; `make help` lists the rest.

# The first Python on PATH that is new enough; another one: make PYTHON=/path/to/python3
IS_SUPPORTED := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(or $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c '$(IS_SUPPORTED)' 2>/dev/null && echo $$p && break; done),python3)
PYTEST_ARGS ?= -n 2
# Of `make test`: tests of more than ten seconds, whose subjects others cover, run in `make test-all`.
QUICK := -m "not slow"
BENCH_ARGS ?=
# Of the machine with the GPU, which has torch and needs no .venv: a Python that runs src/ as it is.
GPU_PYTHON ?= python3

VENV := .venv
RUN := $(VENV)/bin/python -m
STAMP := $(VENV)/.installed

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help demo test test-all lint format bench gpu site constraints clean FORCE

help:  ## list these targets
	@sed -n 's/^\([a-z-]*\):.*## /\1	/p' $(MAKEFILE_LIST) | expand -t 14

demo: $(STAMP)  ## plot three ResNet-50s and train three small ones, into out/demo
	$(VENV)/bin/normfree demo --out out/demo

test: lint  ## lint, types and all tests but the slow ones (PYTEST_ARGS="-n 2")
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(RUN) pytest $(QUICK) $(PYTEST_ARGS)

test-all: QUICK :=
test-all: test  ## the slow ones, too

lint: $(STAMP)  ## check style, formatting and types
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) pyright

format: $(STAMP)  ## fix what ruff can fix, then format
	$(RUN) ruff check --fix-only .
	$(RUN) ruff format .

bench: $(STAMP)  ## time networks beside peers and their limit (BENCH_ARGS="...")
	$(RUN) benchmarks networks --set cpu $(BENCH_ARGS)

gpu:  ## the same on a GPU, with GPU_PYTHON's torch, into $OUT or results/
	PYTHONPATH=src $(GPU_PYTHON) -m benchmarks networks --set gpu $(BENCH_ARGS)

site: $(STAMP)  ## build the documentation's site into out/site
	$(RUN) mkdocs build --strict

constraints: $(STAMP)  ## record the versions in .venv as the pinned ones
	@$(RUN) pip list --format=freeze --exclude normfree --exclude pip > $(VENV)/versions.txt
	@{ sed -n '/^#/p' constraints.txt; sed 's/+.*//' $(VENV)/versions.txt; } > constraints.txt.new
	@mv constraints.txt.new constraints.txt

clean:  ## remove caches, build products and the demo's output; .venv stays
	rm -rf build dist out/demo .pytest_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is written last and names this folder: an interrupted install leaves none, and a .venv that
# was copied or moved here, whose editable install points at another checkout, is installed again.
ifneq ($(shell cat $(STAMP) 2>/dev/null),$(CURDIR))
$(STAMP): FORCE
endif

$(STAMP): pyproject.toml constraints.txt
	@rm -f $@
	@$(VENV)/bin/python -c 'import pip; $(IS_SUPPORTED)' 2>/dev/null || { \
	  $(PYTHON) -c '$(IS_SUPPORTED)' 2>/dev/null || { \
	    echo "normfree needs Python 3.11 or newer, and '$(PYTHON)' is not: make PYTHON=/path/to/python3" >&2; \
	    exit 1; }; \
	  $(PYTHON) -m venv --clear $(VENV) || { \
	    echo "'$(PYTHON) -m venv' failed: on Debian and Ubuntu, install the package python3-venv" >&2; \
	    exit 1; }; }
	@echo "installing into $(VENV) (about 2 minutes, 7 GB the first time) ..."
	@$(RUN) pip install --quiet -c constraints.txt -e '.[dev]'
	@printf '%s\n' '$(CURDIR)' > $@
