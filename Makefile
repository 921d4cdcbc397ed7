# Every target sets itself up: the first call makes .venv with the versions of constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

SEED ?= 0

.PHONY: help test check lint types unit docs dist matrix own fuzz bench clean

help:
	@echo "make test   everything CI runs: lint, types, unit tests and doctests, docs, distribution"
	@echo "make check  format, lint, types and the fast tests, in a minute: before every commit"
	@echo "make docs   the documentation in build/docs, every warning an error"
	@echo "make dist   sdist and wheel: metadata, contents, and the wheel alone running README.md"
	@echo "make matrix the core tests with the oldest and the newest Python and torch; gigabytes"
	@echo "make own    adapt a network to a small synthetic pair, as to images of your own; SEED=0"
	@echo "make fuzz   100,000 random calls of the public functions; SEED=0; half an hour"
	@echo "make bench  what the operators cost, as multiples of the memory traffic they need"
	@echo "make clean  remove what the other targets made, but for runs/"

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python $(INSTALL) --editable ".[docs,examples,segformer,test]"
	touch $@

test: lint types unit docs dist

# The numbers of the papers' code, the core of the library, and what a new public name needs.
FAST := $(patsubst %,tests/test_%.py,words public_api golden anchors category_anchors pseudo_labels evaluation) \
	tests/test_package.py::test_public_name_is_documented \
	tests/test_checks.py::test_the_guide_has_an_example_of_every_error \
	tests/test_downstream.py::test_it_uses_every_public_name
check: $(VENV)/installed
	$(BIN)/ruff format
	$(BIN)/ruff format --line-length 76 docs/*.md
	$(MAKE) lint types
	$(BIN)/pytest --quiet $(FAST)

lint: $(VENV)/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/ruff format --check --line-length 76 docs/*.md
	$(BIN)/python tests/words.py

types: $(VENV)/installed
	$(BIN)/mypy

# A process a core, each test on one thread; a file's tests share their slow fixtures.
unit: $(VENV)/installed
	$(BIN)/pytest --numprocesses auto --dist loadfile

docs: $(VENV)/installed
	$(BIN)/sphinx-build --fail-on-warning --keep-going --nitpicky --quiet --fresh-env docs build/docs

# Metadata and contents; then the wheel alone, in an empty environment, with nothing but the run-time
# dependencies, every warning an error.
dist: $(VENV)/installed
	rm -rf dist build/wheel-only
	$(BIN)/python -m build --outdir dist
	$(BIN)/twine check --strict dist/*
	$(BIN)/python tests/distribution.py dist
	$(PYTHON) -m venv build/wheel-only
	build/wheel-only/bin/python $(INSTALL) dist/*.whl
	build/wheel-only/bin/python -I -W error tests/readme_blocks.py README.md

# The core tests with the oldest and the newest Python and torch; not part of `make test`, as it
# installs two more torch, on Linux of several gigabytes each.
matrix:
	$(PYTHON) tests/matrix.py

own: OWN := runs/own-seed$(SEED)
own: $(VENV)/installed
	rm -rf "$(OWN)"
	$(BIN)/python examples/synthetic/folders.py "$(OWN)/data" --seed "$(SEED)"
	$(BIN)/python examples/segmentation.py --source "$(OWN)/data/source" --target "$(OWN)/data/target" \
		--classes "$(OWN)/data/classes.txt" --output "$(OWN)" --seed "$(SEED)"

fuzz: $(VENV)/installed
	$(BIN)/python -m tests.fuzz --calls 100000 --seed "$(SEED)"

bench: $(VENV)/installed
	$(BIN)/python benchmarks/operators.py --output runs/bench

clean:
	rm -rf $(VENV) dist build
