"""HLLM: sequential recommendation with language models (arXiv 2409.12740)."""

__version__ = "0.1.0"
