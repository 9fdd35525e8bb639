# Two commands do everything on a fresh machine: `make demo` and `make test`. Each makes .venv first if it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A file's tests stay together, as they share runs. In the order of the names: the last files are short ones.
PYTEST := $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder
# The demo runs two processes, on CPU or on two GPUs; a machine with a single GPU gets one.
DEMO_PROCESSES ?= $(shell [ "$$(nvidia-smi -L 2>/dev/null | wc -l)" = 1 ] && echo 1 || echo 2)

.PHONY: demo test test-fast test-slow test-gpu lint bench docs tensorboard setup clean

setup: $(VENV)/.installed

$(VENV)/.installed: setup.py pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

demo: setup  ## distil a student on handwritten digits: minutes on two CPU cores
	rm -rf runs/demo
	PATH="$(CURDIR)/$(BIN):$$PATH" deepspeed -q --num_gpus $(DEMO_PROCESSES) leap_dist/train.py

test: setup  ## everything but the slow tests, two files at a time: 8 minutes on two cores
	OMP_NUM_THREADS=1 $(PYTEST) -m "not slow"

test-fast: setup  ## what takes a second or so each at most, for the loop at the desk: 90 seconds
	OMP_NUM_THREADS=1 $(PYTEST) -m "not slow and not seconds" --ignore tests/distributed

test-slow: setup  ## the slow tests only
	OMP_NUM_THREADS=1 $(PYTEST) -m slow

# Whole runs and kernels on CUDA. NVML: asking whether there is a GPU must not begin to use it, or ranks could not fork.
test-gpu: setup  ## kernels and the suite's whole runs on CUDA; skips what needs more GPUs than there are
	DS_ACCELERATOR=cuda PYTORCH_NVML_BASED_CUDA_CHECK=1 $(BIN)/python -m pytest -q -m "not slow" \
		tests/kernels tests/unit/teacher/test_lookahead.py $(addprefix tests/distributed/test_,$(addsuffix .py,\
		backbones cohort demo equivalence evaluated_epochs modes replay reset resume supervised_runs))

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
