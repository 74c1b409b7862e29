# make demo   the whole job on real footage: data, training, evaluation, an edited video
# make test   all tests          make check  lint, format, types, import contract
# make quick  those of them that start nothing: ARGS=tests/serve is a folder's inner loop
# make hosts  serving and training on three hosts that vanish, are cut off or have a bad line, as root
#             on Linux (some minutes)
# make mutants   change the core on purpose, 300 times, and list what no test notices (an hour)
# make venv   the environment    make clean  remove the environment and everything made in runs/
#
# ARGS="tests/data -k pause" are further arguments of a command, WORKERS=4 processes run the tests
# or the mutants.
# PYTHON=python3.12 picks the interpreter that the environment is made from (3.11 or newer).

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
ARGS ?=
WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help venv demo test quick hosts mutants check format clean

help:
	@sed -n '1,/^$$/s/^# \{0,1\}//p' Makefile

venv: $(STAMP)

# torch goes in through pip, so that an index or a folder of wheels which pip is configured with
# applies to it; uv then resolves the rest in seconds. DS_BUILD_OPS=0: no kernel is compiled.
# --compile-bytecode: Ray starts dozens of processes, and each would compile what it imports.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if v >= (3, 11) else \
	"LiveEdit needs Python 3.11 or newer, and $(PYTHON) is %d.%d: make $(MAKECMDGOALS) PYTHON=python3.12" % v)'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check -q -c constraints.txt torch uv
	DS_BUILD_OPS=0 $(BIN)/uv pip install -q --compile-bytecode --python $(BIN)/python -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP)
	$(BIN)/liveedit demo $(ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

quick: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS) -m "not slow" $(ARGS)

hosts: $(STAMP)
	$(BIN)/python -m pytest -s -m hosts tests/hosts $(ARGS)

mutants: $(STAMP)
	$(BIN)/python -m tests.mutants --processes $(WORKERS) $(ARGS)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv runs .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
