# Two commands do everything on a fresh machine: `make demo` and `make test`. Both set up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready-$(shell cat requirements-cpu.txt requirements-dev.txt pyproject.toml | cksum | cut -d' ' -f1)

.PHONY: demo test lint bench clean setup

setup: $(STAMP)

# --no-deps: torchrec's metadata asks for the CUDA fbgemm-gpu, which would overwrite fbgemm-gpu-cpu's files.
$(STAMP): requirements-cpu.txt requirements-dev.txt pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) not found; set PYTHON=/path/to/python3.11" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-cpu.txt -r requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	rm -f $(VENV)/.ready-*
	touch $@

demo: $(STAMP)
	$(BIN)/python examples/demo.py

# Passive: threads that spin while they wait make a shared machine crawl. Most of the time goes into kernels that are
# compiled one by one: files of tests run side by side, on up to four cores. A process of tests that dies ends the run:
# one in its place would leave the others waiting for ever.
test: $(STAMP)
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile \
		--no-loadscope-reorder --max-worker-restart 0

# The speed of every operator against its targets and peers, then of a whole training step.
bench: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-bench.txt
	$(BIN)/python -m recemb bench ops
	$(BIN)/python -m recemb bench train

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis runs
