# make demo   distill the shipped teacher to one step, measure it, export it, and show the result
# make test   the whole test suite
# DEMO="seed=1 output=runs/demo-1" passes overrides to the demo; its threads wait without spinning, so that a busy
# machine does not slow it down twentyfold.
# Both make the environment they need in .venv; PYTHON chooses the interpreter (3.11 or newer).

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --progress-bar off --constraint constraints.txt

.PHONY: demo test lint clean

demo: $(VENV)/core.done
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m diffdistill.demo $(DEMO)

test: $(VENV)/test.done lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --durations=10

lint: $(VENV)/test.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "diffdistill needs Python 3.11 or newer, and $(PYTHON) is older; try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	@$(PYTHON) -m venv $(VENV) || \
		{ rm -rf $(VENV); echo "$(PYTHON) cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv"; exit 2; }

$(VENV)/core.done: $(VENV)/bin/python pyproject.toml constraints.txt
	@echo "Installing the pinned versions into $(VENV) (a few minutes, mostly torch) ..."
	$(PIP) --editable .
	@touch $@

$(VENV)/test.done: $(VENV)/core.done
	$(PIP) --editable '.[test]'
	@touch $@

clean:  # keeps runs/, which may hold work
	rm -rf $(VENV)
