"""Every error a user can meet: one sentence that says what was wrong, where, and the next step.

The command line prints the sentence and exits with the error's `exit_code`; the library raises it.
"""


class OrcdError(Exception):
    """Root of all errors raised on purpose; anything else that escapes is a bug."""

    exit_code = 2


class ConfigError(OrcdError):
    """An option that is unknown, ill-typed, or contradicts another."""


class InputError(OrcdError):
    """Input data that cannot be read as a whole: a missing file or column, a repeated id."""


class OutputError(OrcdError):
    """An output that cannot be written, or that belongs to a different job."""


class CheckpointError(OrcdError):
    """A model file that is malformed, contradicts itself, or asks for what we do not support."""


class TokenizerError(OrcdError):
    """A vocabulary we cannot build a tokenizer from."""


class RowError(OrcdError):
    """One row that cannot be run; the job records it (kind `input`) and goes on."""

    exit_code = 1


class TemplateError(RowError):
    """A chat template that failed, or went beyond its limits of time, output or memory."""


class DeviceError(OrcdError):
    """No usable device, or not enough memory on it."""


class ScaleOutError(OrcdError):
    """Workers that cannot be started, differ from each other, or are all gone."""


class ClosedError(OrcdError):
    """A model that was used after `close()`."""


class ContextFullError(OrcdError):
    """A sequence that has reached the model's context length."""


class Interrupted(OrcdError):
    """The user stopped the job; finished rows are kept and the same command resumes."""

    exit_code = 130
