"""HLLM: sequential recommendation with language models (arXiv 2409.12740)."""

import os

__version__ = "0.1.0"

# Before torch loads its thread pool: idle threads sleep instead of spinning. On two cores with one other busy process,
# a training step took 0.27 s spinning and 0.09 s sleeping.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
