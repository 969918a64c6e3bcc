PYTHON ?= python3
BIN := .venv/bin
TWO := -n 2 --dist loadfile --no-loadscope-reorder
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: setup demo test test-floor test-newest test-gpu test-browser test-review test-faults test-fuzz audit-deps check format clean

setup: .venv/installed

# TORCH=cpu and TORCH=default choose torch's build; tools/setup.sh says what it takes by itself.
.venv/installed: pyproject.toml constraints.txt tools/setup.sh
	tools/setup.sh .venv constraints.txt $(PYTHON)

# The ends of the ranges in pyproject.toml, each in an environment of its own.
.venv-%/installed: pyproject.toml constraints-%.txt tools/setup.sh
	tools/setup.sh .venv-$* constraints-$*.txt $(PYTHON)

demo: setup
	$(BIN)/softpref demo --output runs/demo

test: setup
	$(BIN)/pytest $(TWO) --ignore tests/browser

test-floor test-newest: test-%: .venv-%/installed
	.venv-$*/bin/pytest $(TWO) --ignore tests/browser

# A hundred kills, some 15 minutes.
test-faults: setup
	SOFTPREF_KILLS=50 $(BIN)/pytest -rs -n 2 tests/faults

# 168,000 damaged inputs, two and a half minutes of one core.
test-fuzz: setup
	SOFTPREF_FUZZ=8000 $(BIN)/pytest -n 2 tests/fuzz

test-gpu: setup
	$(BIN)/python -c "import torch; assert torch.cuda.is_available(), 'torch sees no CUDA device'"
	CUDA_VISIBLE_DEVICES=0 $(BIN)/pytest tests/gpu

# A real browser; Debian's, where it is missing.
test-browser: setup
	(command -v chromium && command -v chromedriver) || (apt-get update && apt-get install --yes chromium chromium-driver)
	command -v chromium && command -v chromedriver
	$(BIN)/pip install --quiet --constraint constraints.txt selenium
	$(BIN)/pytest tests/browser

# What review tools import and export, by their own packages.
test-review: setup
	$(BIN)/pip install --quiet --constraint constraints.txt argilla label-studio-sdk
	$(BIN)/python -c "import argilla, label_studio_sdk"
	$(BIN)/pytest tests/auditing/test_review_tools.py

# Known flaws of the pinned versions; asks a database on the network.
audit-deps: setup
	$(BIN)/pip install --quiet pip-audit
	$(BIN)/pip-audit --requirement constraints.txt --no-deps --disable-pip

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv .venv-* runs
