# The two commands of the README: `make book` and `make test`. Each sets up .venv by itself.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: book pdf picture test places lint site-test links bench check setup clean

book: setup
	$(BIN)/samlib book

# The whole book in one file, _build/book.pdf; needs Chromium.
pdf: setup
	$(BIN)/samlib book --pdf

# The picture that the README opens with, from the published runs; a test fails if it is no longer theirs.
picture: setup
	$(BIN)/python -c "from samlib import figures, published_runs; \
	open('book/_static/edge.svg', 'w', encoding='utf-8').write(figures.standalone(figures.typical(published_runs('mnist'))))"

# Without the browser tests, which look at the built book: those are `make site-test`.
test: lint
	OMP_NUM_THREADS=1 PYTHONWARNDEFAULTENCODING=1 $(BIN)/python -m pytest --numprocesses=2 --ignore=tests/test_site.py --ignore=tests/test_live.py --cov=samlib --cov-report=term-missing:skip-covered --cov-fail-under=90

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/codespell README.md CONTRIBUTING.md book samlib tests benchmarks data/README.md

# The tests in the locale C, and from a checkout that cannot be written.
places: setup
	.ci/places

# The built website in Chromium; skipped where there is none. Leaves pictures of every page in _build/screenshots.
site-test: setup
	$(BIN)/python -m pytest --numprocesses=2 tests/test_site.py tests/test_live.py

# The links that lead out of the built book; needs a network.
links: setup
	$(BIN)/jupyter-book build _build/stage --path-output _build/links --builder linkcheck

# Measures against other tools, into benchmarks/results/; half an hour on an otherwise idle machine.
bench: setup book
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[bench]"
	$(BIN)/python benchmarks/sharpness.py
	$(BIN)/python benchmarks/costs.py
	$(BIN)/python benchmarks/monitor.py
	$(BIN)/python benchmarks/reference.py
	$(BIN)/python benchmarks/site_lcp.py
	-$(BIN)/python benchmarks/sweep_overhead.py

# All that continuous integration runs, in its order: the browser tests look at the book.
check:
	$(MAKE) test
	$(MAKE) book
	$(MAKE) site-test

setup: .venv/ready
.venv/ready: constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"samlib needs Python 3.11 or newer, found {sys.version.split()[0]}; run make PYTHON=/path/to/python3.11")'
	@echo "Setting up .venv (a few minutes: PyTorch and Jupyter Book are large)"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[book,ray,test]"
	@touch $@

clean:
	rm -rf .venv _build runs
