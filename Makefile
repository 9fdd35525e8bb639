# Two commands do everything on a fresh machine: `make demo` and `make test`. Each makes .venv first if it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The demo runs two processes, on CPU or on two GPUs; a machine with a single GPU gets one.
DEMO_PROCESSES ?= $(shell [ "$$(nvidia-smi -L 2>/dev/null | wc -l)" = 1 ] && echo 1 || echo 2)

.PHONY: demo test test-slow lint bench docs tensorboard setup clean

setup: $(VENV)/.installed

$(VENV)/.installed: setup.py pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

demo: setup  ## distil a student on handwritten digits: minutes on two CPU cores
	rm -rf runs/demo
	PATH="$(CURDIR)/$(BIN):$$PATH" deepspeed -q --num_gpus $(DEMO_PROCESSES) leap_dist/train.py

test: setup  ## everything but the slow tests: those of one process two at a time, then those of several
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not slow" -n 2 --dist loadfile --ignore tests/distributed
	$(BIN)/python -m pytest -q -m "not slow" tests/distributed

test-slow: setup  ## the slow tests only
	$(BIN)/python -m pytest -q -m slow

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tools/check_house.py

bench: setup  ## speed and memory, as ratios measured in one run
	$(BIN)/python tools/bench/feature_match.py
	$(BIN)/python tools/bench/teacher.py --tolerance 0.08
	$(BIN)/python tools/bench/step.py
	$(BIN)/python tools/bench/step.py --pair small

docs: $(VENV)/.docs  ## the documentation as a site, in site/; warnings and dead links are errors
	$(BIN)/sphinx-build -q -E -n -W --keep-going -d build/docs -c docs/site . site
	@echo written to site/index.html

$(VENV)/.docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[docs]'
	touch $@

tensorboard: setup
	$(BIN)/tensorboard --logdir runs

clean:
	rm -rf $(VENV) build site *.egg-info
