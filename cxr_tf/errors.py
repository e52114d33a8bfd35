"""Errors that are meant for the person who gave the input."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class CxrError(Exception):
    """Bad input, said in a sentence: what is wrong, where, what is accepted, what to do.

    The command line prints its text and exits with 1; a traceback would say nothing more.
    """


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns ` Did you mean "x"?` for the known name closest to `name`, or an empty string.

    Example:
        >>> nearest("densnet121", ["densenet121", "resnet50v2"])
        ' Did you mean "densenet121"?'
    """
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f' Did you mean "{close[0]}"?' if close else ""


def innermost(error: BaseException) -> str:
    """The line that says it, out of TensorFlow's long messages: the error that was raised inside, or the first line.

    Example:
        >>> innermost(ValueError("ShardError: a.tfrecord is cut off\n\nTraceback: ..."))
        'a.tfrecord is cut off'
    """
    lines = [line.strip() for line in str(getattr(error, "message", error)).splitlines() if line.strip()]
    for line in lines:
        kind, told, text = line.partition("Error: ")
        if told and kind.replace("_", "").replace(".", "").isalnum():
            return text
    return lines[0] if lines else type(error).__name__
