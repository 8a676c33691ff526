"""The one exception that the command line turns into a line on the screen instead of a traceback."""


class InputError(ValueError):
    """What a user can mend; its text is one line: what was wrong, what is allowed, what to do."""
