"""The exceptions that the command line turns into a line on the screen instead of a traceback."""

import signal


class InputError(ValueError):
    """An error that a user can correct. Its text is one line: what was wrong, what is allowed, what to do."""


class Interrupted(BaseException):
    """Ctrl-C or SIGTERM (`signum`) came. It is not an Exception, so that no handler of faults catches it."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


def out_of_memory(error: BaseException) -> bool:
    """True if the error says that a GPU or the system had no memory left."""
    texts = "out of memory", "ALLOC_FAILED", "can't allocate memory", "Cannot allocate memory", "not enough memory"
    kind = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return kind or any(text in str(error) for text in texts)
