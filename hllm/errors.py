"""Errors a person can mend: every message names the file, row or flag, and what to do about it.

Entry points print these as one line, without a traceback; anything else is a defect of ours and keeps its traceback.
"""


class HllmError(Exception):
    """Base of all errors caused by input, configuration or the machine rather than by a defect in hllm."""


class ConfigError(HllmError):
    """A flag has a value, or a combination of values, that cannot work."""


class DataError(HllmError):
    """A raw data file is missing, malformed or not what its data set publishes."""


class FetchError(HllmError):
    """A model or data file could not be fetched, or is not the pinned one."""


class LLMError(HllmError):
    """A language model could not be found or loaded, or its output is unusable."""


class CacheError(HllmError):
    """The cache folder cannot be read or written."""


class DivergedError(HllmError, FloatingPointError):
    """Training ran into values that are not numbers."""


class CollapsedError(HllmError):
    """Item vectors became alike, or no negatives are left: the loss has nothing more to teach."""


class CheckpointError(HllmError):
    """A checkpoint is missing, torn, or belongs to another configuration."""
