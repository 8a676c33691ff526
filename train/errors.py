"""The exceptions that the command line turns into a line on the screen instead of a traceback."""

import signal


class InputError(ValueError):
    """What a user can mend; its text is one line: what was wrong, what is allowed, what to do."""


class Interrupted(BaseException):
    """Ctrl-C or SIGTERM came, and what is worth keeping has been written. `signum` is the signal.

    No Exception, so that nothing on the way takes it for a fault and goes on.
    """

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


def out_of_memory(error: BaseException) -> bool:
    """A GPU's, and what torch and Python say where the system gives a CPU none."""
    said = "out of memory", "ALLOC_FAILED", "can't allocate memory", "Cannot allocate memory", "not enough memory"
    kind = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return kind or any(text in str(error) for text in said)
