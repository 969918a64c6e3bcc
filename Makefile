PYTHON ?= python3
BIN := .venv/bin
TWO := -n 2 --dist loadfile --no-loadscope-reorder
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: setup demo test test-floor test-newest test-gpu test-browser test-readme test-review test-trackers test-quantized test-faults test-fuzz audit-deps docs dist test-dist check format clean

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

# Needs no network once the packages are there. To read it: python3 -m http.server -d runs/site
docs: setup
	$(BIN)/mkdocs --version >/dev/null 2>&1 || $(BIN)/pip install --quiet --constraint constraints.txt --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Every command of README.md, in a fresh directory; MODEL=DIR takes another model than README's.
test-readme: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python tools/readme.py README.md

# What review tools import and export, by their own packages.
test-review: setup
	$(BIN)/pip install --quiet --constraint constraints.txt argilla label-studio-sdk
	$(BIN)/python -c "import argilla, label_studio_sdk"
	$(BIN)/pytest tests/auditing/test_review_tools.py

# Noise rate, label histogram and learned map in real trackers.
test-trackers: setup
	$(BIN)/pip install --quiet --constraint constraints.txt tensorboard wandb
	$(BIN)/python -c "import tensorboard, wandb"
	$(BIN)/pytest tests/training/test_tracking.py

# Bases in 4 and 8 bits, on the CPU.
test-quantized: setup
	$(BIN)/pip install --quiet --constraint constraints.txt bitsandbytes
	$(BIN)/python -c "import bitsandbytes"
	$(BIN)/pytest tests/models/test_quantized.py

# Known flaws of the pinned versions; asks a database on the network.
audit-deps: setup
	$(BIN)/pip install --quiet pip-audit
	$(BIN)/pip-audit --requirement constraints.txt --no-deps --disable-pip

# Wheel and sdist; build fetches hatchling into an environment of its own.
dist: setup
	rm -rf dist
	$(BIN)/pip install --quiet --constraint constraints.txt build
	$(BIN)/python -m build --outdir dist

# The wheel in an empty environment. DEPENDENCIES=install fetches its dependencies instead of
# borrowing those of .venv, and DEMO=1 runs the demo from it, two to four minutes.
test-dist: dist
	tools/test_dist.sh $(BIN)/python dist

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv .venv-* dist runs
