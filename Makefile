# minidiff: everything a reader or a contributor runs. `make help` lists it.
#
# A target that has nothing new to do does nothing: each stage depends on the files it reads, and leaves a
# stamp when it has passed. `make retest` does it all again.

PYTHON ?= python3
VENV   ?= .venv
JOBS   ?= 2

BIN       := $(VENV)/bin
INSTALLED := $(VENV)/.installed
LINTED    := _build/.linted
UNITS     := _build/.units
BOOK      := _build/html/index.html

# Notebooks are opened by Jupyter, which leaves checkpoints; Python leaves caches. Neither is a source.
find = $(shell find $(1) -type f ! -path '*/__pycache__/*' ! -path '*/.ipynb_checkpoints/*' 2>/dev/null)

LIBRARY   := pyproject.toml $(call find,minidiff)
NOTEBOOKS := $(wildcard notebooks/*.ipynb)
PAGES     := _config.yml _toc.yml $(call find,book)
CHECKS    := $(call find,tests tools benchmarks studies examples) README.md environment.yml constraints.txt

# Nothing that is tested may look for the internet, whatever the machine offers.
OFFLINE := HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# Unit tests run side by side, each worker with one thread: more would only fight for the cores. A file stays
# with one worker, so that what its tests share is made once.
UNITTEST := OMP_NUM_THREADS=1 $(OFFLINE) $(BIN)/python -m pytest --numprocesses=$(JOBS) --dist=loadfile

.DELETE_ON_ERROR:
.PHONY: help install test retest quick executed book pages bench lab mutants soak matrix coverage notebooks lint format clean

help:
	@echo "make book       render the book, print where it is"
	@echo "make test       lint, types, unit tests, every notebook; each skipped if nothing changed"
	@echo "make retest     the same, whether or not anything changed"
	@echo "make quick      lint, types and the tests that train nothing: a minute"
	@echo "make pages      render the book and look at every page in Chromium: is anything cut off, on a phone too?"
	@echo "make lab        open the notebooks in JupyterLab (installs it first)"
	@echo "make notebooks  execute the notebooks again, in place"
	@echo "make mutants    plant classic mistakes, one at a time: do the tests notice?"
	@echo "make soak       kill runs again and again, fill a disk, draw thousands of pictures: most of an hour"
	@echo "make matrix     the unit tests on other Pythons, and with the oldest versions: hours"
	@echo "make coverage   which lines of the library no unit test runs"
	@echo "make bench      measure beside other libraries (installs them first), and write the book's page of it"
	@echo "make lint       lint and types only"
	@echo "make format     put the code in the project's format"
	@echo "make install    the virtual environment only ($(VENV))"
	@echo "make clean      delete what was built; the virtual environment stays"
	@echo
	@echo "PYTHON=python3.12 chooses the interpreter, Python 3.11 or newer (now: $(PYTHON))."
	@echo "JOBS=8 runs as many unit tests side by side (now: $(JOBS)); more than the cores there are gain nothing."

install: $(INSTALLED)

# The environment is made anew when its Python is gone, and brought up to date when the versions change.
$(INSTALLED): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "No '$(PYTHON)' here: install Python 3.11 or newer, or name one, as in 'make PYTHON=/path/to/python3 $(MAKECMDGOALS)'." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "minidiff needs Python 3.11 or newer and '$(PYTHON)' is $$($(PYTHON) --version 2>&1): name a newer one, as in 'make PYTHON=python3.12 $(MAKECMDGOALS)'." >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "'$(PYTHON)' cannot make virtual environments: install its venv module (on Debian and Ubuntu, the package python3-venv)." >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@echo "Installing into $(VENV): a few minutes, and on Linux about 6 GB, most of it PyTorch's GPU libraries."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[book,tests]' --constraint constraints.txt
	@touch $@

test: $(LINTED) $(UNITS) executed
	@echo "Tests and notebooks passed on these sources; 'make retest' runs everything again."

retest:
	@rm -f $(LINTED) $(UNITS) _build/.executed-*
	@$(MAKE) --no-print-directory test

lint:
	@rm -f $(LINTED)
	@$(MAKE) --no-print-directory $(LINTED)

$(LINTED): $(INSTALLED) $(LIBRARY) $(NOTEBOOKS) $(CHECKS)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy
	@mkdir -p $(@D) && touch $@

$(UNITS): $(INSTALLED) $(LIBRARY) $(NOTEBOOKS) $(PAGES) $(CHECKS)
	$(UNITTEST)
	@mkdir -p $(@D) && touch $@

# Lint and types, and the tests of what is not a training run: for the minute between two edits.
quick: $(LINTED)
	$(UNITTEST) -q -m "not slow"

# The notebooks whose code, or what they use of the library, does something else than when they last passed:
# tools/stale.py tells, and _build keeps a stamp for each. A docstring runs none.
executed: $(INSTALLED)
	@$(OFFLINE) $(BIN)/python -m tools.rerun _build

format: $(INSTALLED)
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

# -W -n: a broken link, citation or cross-reference fails the build. --all: a partial build hides them.
book: $(BOOK)
	@echo "The book: $(CURDIR)/$(BOOK)"

$(BOOK): $(INSTALLED) $(LIBRARY) $(NOTEBOOKS) $(PAGES)
	$(OFFLINE) $(BIN)/jupyter-book build -W --keep-going -n --all --quiet .
	@touch $@

# Needs a Chromium or Chrome on the PATH, which nothing here installs.
pages: $(BOOK)
	$(BIN)/python tools/pages.py

lab: $(INSTALLED)
	@test -x $(BIN)/jupyter-lab || $(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[lab]' --constraint constraints.txt
	$(BIN)/jupyter-lab notebooks

# Plants classic mistakes in the library, one at a time: the tests must notice each.
mutants: $(INSTALLED)
	$(BIN)/python tests/mutants.py

# Most of an hour: the page of promises quotes what it writes.
soak: $(INSTALLED)
	$(OFFLINE) $(BIN)/python tests/soak.py

# The page of promises quotes what it writes. TESTS='-m "not slow"' runs some, CELL="3.12 pinned" one column.
matrix: $(INSTALLED)
	$(BIN)/python -m tools.matrix $(if $(CELL),--cell "$(CELL)") --jobs $(JOBS) -- $(TESTS)

# Of every process that the tests start, too: pyproject.toml says how. No part of `make test`, which it slows down.
coverage: $(INSTALLED)
	@rm -f _build/.coverage*
	@mkdir -p _build
	$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python -m coverage run -m pytest -q --numprocesses=$(JOBS) --dist=loadfile $(TESTS)
	@$(BIN)/python -m coverage combine -q
	$(BIN)/python -m coverage report

notebooks: $(INSTALLED)
	$(BIN)/python tools/notebooks.py

# All parts of benchmarks/ in turn, then the tables that they fill: on two cores under twenty minutes. The figures
# are the CPU's, so a GPU is hidden.
bench: $(INSTALLED)
	@$(BIN)/python -m pip show --quiet smalldiffusion 2>/dev/null || $(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[benchmarks]' --constraint constraints.txt
	CUDA_VISIBLE_DEVICES= $(OFFLINE) $(BIN)/python -m benchmarks

clean:
	rm -rf _build .mypy_cache .pytest_cache .ruff_cache
