# make demo   install into .venv, train the built-in model for a few minutes, show what it learned
# make test   install with the test extras, then lint, types and tests
# make constraints   rewrite constraints.txt with the newest versions that setup.py allows
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test constraints

demo: $(VENV)/.core
	$(BIN)/torchrun --nproc_per_node=1 scripts/train_nft_sd3.py --config config/nft.py:shapes_demo

test: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.core: setup.py constraints.txt | $(BIN)/python
	$(BIN)/pip install -q -c constraints.txt -e .
	touch $@

$(VENV)/.test: setup.py constraints.txt | $(BIN)/python
	$(BIN)/pip install -q -c constraints.txt -e '.[test]'
	touch $@ $(VENV)/.core

constraints:
	$(PYTHON) -m venv --clear build/constraints
	build/constraints/bin/pip install -q -e '.[test]'
	build/constraints/bin/pip freeze --exclude-editable > constraints.txt
