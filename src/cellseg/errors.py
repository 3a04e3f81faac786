"""The errors that are for people: the command prints each as one line, without a traceback.

Each message names the file or the key, the cause and the way out.
"""


class InputError(ValueError):
    """Something that was given cannot be used; the command exits with 2."""


class OutputError(OSError):
    """A result cannot be written; the command exits with 1."""
