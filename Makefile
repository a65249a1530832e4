# make demo   a camera student learns from a cached LiDAR teacher, on this machine, in ten to fifteen minutes
# make test   lint, types and tests
# Both make the virtual environment when it is missing; repeated calls skip what is done.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test lint docs clean

demo: $(VENV)/teacher.installed
	$(BIN)/bevkd demo

test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2

lint: $(VENV)/dev.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/docs.installed
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) demo site build dist

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# One stamp per extra; a change of the requirements installs again.
$(VENV)/%.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) --editable '.[$*]'
	touch $@
