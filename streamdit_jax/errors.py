"""Errors that a user can mend: each message is one line that names the field or file and what would be right.

The command line prints the message and exits with code 2; anything else is a defect of ours and keeps its traceback.
"""


class StreamDiTError(Exception):
    """A mistake in what the user gave: configuration, data, weights or prompt."""


class ConfigError(StreamDiTError, ValueError):
    """A configuration field is unknown, missing, of the wrong type or impossible; the message starts with its path."""


class DataError(StreamDiTError):
    """A data source is missing, damaged or of the wrong kind; the message names the file."""


class CheckpointError(StreamDiTError):
    """A checkpoint or a model directory is missing, foreign, truncated or altered; the message names it."""
