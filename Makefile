# Everything that a fresh machine with Python and make needs: each target sets up .venv if need be.
PYTHON ?= python3
BIN := .venv/bin
# As many processes as there are cores; WORKERS=0 for one, which a debugger can follow.
WORKERS ?= auto
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal
# jaxtyping's hook checks every shape annotation, at more than twice the time, so slow tests do
# without; it breaks torch.compile, so those tests run apart.
CHECK_SHAPES := --jaxtyping-packages=bayesattn,beartype.beartype
# pytest exits with 5 where no test bears the mark.
NONE_IS_FINE := || [ $$? -eq 5 ]

.PHONY: help demo test test-slow test-all bench lint types format clean
.DELETE_ON_ERROR:

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile

demo: .venv/.tests ## Run examples/quickstart.py on real text; writes to out/
	$(BIN)/python examples/quickstart.py

test: .venv/.tests ## Run the tests, less the slow ones
	$(PYTEST) $(CHECK_SHAPES) -m "not compile and not slow"
	$(PYTEST) -m "compile and not slow" $(NONE_IS_FINE)

test-slow: .venv/.tests ## Run the slow tests
	$(PYTEST) -m "not compile and slow" $(NONE_IS_FINE)
	$(PYTEST) -m "compile and slow" $(NONE_IS_FINE)

test-all: test test-slow ## Run all tests

bench: .venv/.tests ## Measure speed and memory; beside JAX packages if `pip install -e '.[bench]'`
	$(BIN)/python -m tests.benchmarks.svgd_speed
	$(BIN)/python -m tests.benchmarks.svgd_memory
	$(BIN)/python -m tests.benchmarks.attention_speed
	$(BIN)/python -m tests.benchmarks.edge_speed
	$(BIN)/python -m tests.benchmarks.repulsion_speed
	$(BIN)/python -m tests.benchmarks.alignment_speed
	$(BIN)/python -m tests.benchmarks.factorization_speed

lint: .venv/.dev ## Check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/.dev ## Check types
	$(BIN)/pyright --pythonpath $(BIN)/python

format: .venv/.dev ## Format, and mend what can be mended
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## Remove what the targets made, .venv included
	rm -rf .venv build dist out *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One thread per process: the tests' matrices are small, and chains run in processes of their own.
test test-slow: export OMP_NUM_THREADS := 1

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	{ echo "bayesattn needs Python 3.11 or later, but PYTHON=$(PYTHON) is not: make PYTHON=/path/to/python" >&2; exit 1; }
	$(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }

.venv/.tests: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@

.venv/.dev: .venv/.tests
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[test,dev]'
	@touch $@
