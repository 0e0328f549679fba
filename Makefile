# `make demo PROMPT="..."` makes a picture with a heat map for every word; `make test` runs every check.
# Both create what they need in .venv, once; a second run starts at once.

PYTHON ?= python3
PROMPT ?= a red cube and a blue ball on the grass
OUT ?= out
VENV := .venv
BIN := $(VENV)/bin

export PROMPT OUT

.PHONY: demo test clean

demo: $(VENV)/.installed
	@$(BIN)/sfumato make "$$PROMPT" --with daam -o "$$OUT"

# with bytecode, or each of the processes that tests start compiles the package anew
test: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and f"sfumato needs Python 3.10 or later; {sys.executable} is {sys.version.split()[0]}. Try: make PYTHON=python3.11")'
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
