"""What ends a command other than success: bad input, and a signal."""

import signal


class UserError(Exception):
    """A fault of the input: one sentence that names the key or file and what would be right.

    The command line prints it without a traceback and exits with status 1.
    """


class Interrupted(KeyboardInterrupt):
    """A signal asked the run to end, and it did, at a place from which it can go on.

    A KeyboardInterrupt, so that it ends a whole sweep and not one job of it.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__(
            f"stopped by {signal.Signals(number).name}; the same command goes on from here."
        )
