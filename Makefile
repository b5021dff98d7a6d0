# `make quickstart` and `make test` need Python 3.11 to 3.13 and nothing else: they create .venv and install into it.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.installed
# Two workers; the tests of a file stay on one, whose fixtures they share. In the order of names: files of few tests are
# the slow ones here, and would be left to one worker at the end.
SHARED := -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: help quickstart test check check-all check-lowest conformance interop format clean

help:             ## list the targets
	@grep -E '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/:.*## +/\t/' | sort

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else f"lit-peft needs Python 3.11 to 3.13; {sys.executable} is {v[0]}.{v[1]}. Try: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

quickstart: $(READY)  ## train the bundled demo: about a minute on two cores, no network
	@# One thread: the model is small, and threads that wait for one another lose minutes on a busy machine.
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/lit-peft fit --config quickstart

test: $(READY)    ## the fast tests
	$(BIN)/python -m pytest $(SHARED) -m "not slow"

check: $(READY)   ## what CI runs: format, lint, types, fast tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest $(SHARED) -m "not slow"

check-all: $(READY)  ## check, and the slow tests too
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest $(SHARED)

check-lowest:     ## the fast tests with the oldest versions of the dependencies, in an environment of its own
	$(PYTHON) -m venv $(VENV)-lowest
	@# "lightning>=2.6,<3" becomes "lightning==2.6".
	pins=$$($(PYTHON) -c 'import re, tomllib; \
		names = tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"]; \
		print(*(re.sub(r">=([\d.]+).*", r"==\1", name) for name in names))') && \
		$(VENV)-lowest/bin/python -m pip install --quiet --editable '.[dev]' $$pins
	$(VENV)-lowest/bin/python -m pytest $(SHARED) -m "not slow"

conformance: $(READY)  ## methods by checks, slow ones too (9 minutes on one core): printed and written to docs/conformance.md
	LIT_PEFT_WRITE_DOCS=1 $(BIN)/python -m pytest --quiet tests/test_conformance.py

interop: $(READY)  ## round trips with HF PEFT (two minutes on one core): printed and written to docs/interop.md
	LIT_PEFT_WRITE_DOCS=1 $(BIN)/python -m pytest --quiet tests/test_interop_matrix.py && cat docs/interop.md

format: $(READY)  ## write what `check` asks for
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:            ## remove the environment and what the tools cached
	rm -rf $(VENV) $(VENV)-lowest .pytest_cache .mypy_cache .ruff_cache .hypothesis
