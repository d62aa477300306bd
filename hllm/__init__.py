"""HLLM: sequential recommendation with language models (arXiv 2409.12740)."""

import os

__version__ = "0.1.0"

# Before torch loads GNU's thread pool: idle threads spin for some microseconds and then sleep, where by default they
# spin on. Two threads on two cores, a training step: 0.031 s alone on the machine either way, but beside one other
# busy process 0.07 s against 0.09 to 0.27 s (docs/log.md).
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
