# The two commands of the README: `make book` and `make test`. Each sets up .venv by itself.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: book test lint check setup clean

book: setup
	$(BIN)/samlib book

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=2 --cov=samlib --cov-report=term-missing:skip-covered --cov-fail-under=90

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell README.md CONTRIBUTING.md book samlib tests benchmarks data/README.md

# All that continuous integration runs.
check: test book

setup: .venv/ready
.venv/ready: constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"samlib needs Python 3.11 or newer, found {sys.version.split()[0]}; run make PYTHON=/path/to/python3.11")'
	@echo "Setting up .venv (a few minutes: PyTorch and Jupyter Book are large)"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[book,ray,test]"
	@touch $@

clean:
	rm -rf .venv _build runs
