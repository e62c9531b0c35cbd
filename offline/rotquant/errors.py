"""The one exception that users see: a line that says what is wrong, where, and how to mend it."""


class RotQuantError(Exception):
    """Bad input or an unsupported request. The command line prints it as one line, without a traceback."""
