# Each target works on a fresh machine that has Python (>= 3.11) and make: the first one makes .venv.
PYTHON ?= python3
FUZZ_MINUTES ?= 30
BIN := .venv/bin

.PHONY: install pretrain test fuzz faults lint format clean

install: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

pretrain: install
	$(BIN)/python jobs/pretrain.py

test: install
	$(BIN)/python -m pytest -n 2 --dist loadgroup

fuzz: install
	$(BIN)/python tests/fuzz/repeat.py --minutes $(FUZZ_MINUTES)

faults: install
	$(BIN)/python -m pytest tests/faults --long

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build dist *.egg-info
