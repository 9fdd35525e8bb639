"""What all tests have in common."""

from __future__ import annotations

import os

# Runs that tests start are on the CPU, with as many processes as they like, also where there is a GPU or two. Tests
# that are about CUDA ask torch. `make test-gpu` sets this to cuda, and runs of more ranks than GPUs are skipped.
os.environ.setdefault("DS_ACCELERATOR", "cpu")
