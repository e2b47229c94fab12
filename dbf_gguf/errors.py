"""The one error type that the command line turns into a single line instead of a traceback."""


class DBFError(Exception):
    """An expected failure: bad input, a missing tool, a full disk.

    The message is one line that names what is wrong and what to do about it.
    """
