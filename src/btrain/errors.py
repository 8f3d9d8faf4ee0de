"""The one exception that stands for bad input."""


class UserError(Exception):
    """A fault of the input: one sentence that names the key or file and what would be right.

    The command line prints it without a traceback and exits with status 1.
    """
