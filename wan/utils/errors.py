"""Errors that a person can act on."""


class InputError(ValueError):
    """Something the user gave cannot work: a file, a flag, a setting, a checkpoint.

    The message is one line that names the cause and the cure. Entry points print it without a
    traceback and exit with status 2; libraries just raise it.
    """


class CheckpointError(InputError):
    """A checkpoint cannot be read, is of another family, or does not fit the model."""


class Interrupted(KeyboardInterrupt):
    """Work stopped by a signal; the text says how to go on."""
