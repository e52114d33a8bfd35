"""What every command owes the person at the terminal: no traceback for bad input, Ctrl-C or a pipe that was closed."""

from __future__ import annotations

import errno
import os
import sys
import warnings
from collections.abc import Callable

from cxr_tf.errors import CxrError

STOPPED = 130  # exit code of a command that was stopped by Ctrl-C
_OF_STREAMS = (errno.EPIPE, errno.ENOSPC, errno.EIO, errno.EBADF)


def command(run: Callable[[], int]) -> int:
    """Runs a command and returns its exit code; what goes wrong for known reasons is said on standard error.

    Args:
        run: returns the exit code.

    Example:
        >>> command(lambda: 0)
        0
    """
    speak_plainly()
    try:
        code = run()
        sys.stdout.flush()
        return code
    except CxrError as error:
        print(f"error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return STOPPED
    except OSError as error:
        if not lost_output(error):
            raise
    return 1


def lost_output(error: BaseException) -> bool:
    """Whether an error is of standard output (a pipe that was closed, a full disk); it is told then."""
    if not isinstance(error, OSError) or error.filename is not None or error.errno not in _OF_STREAMS:
        return False
    # What is left in the buffer would be tried, and told, once more at the end.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    if not isinstance(error, BrokenPipeError):
        print(f"error: the output cannot be written ({error.strerror or error}).", file=sys.stderr)
    return True


def speak_plainly() -> None:
    """Warnings in one line; letters that a terminal does not have, and paths that are no UTF-8, escaped."""
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    for stream in (sys.stdout, sys.stderr):
        if reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(errors="backslashreplace")
