"""Progress and time left of long work: a bar in a terminal, a line every few seconds in a log."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Update(Protocol):
    """Called with how much is done, of how much, and optionally a few words on how it goes."""

    def __call__(self, done: int, total: int, note: str = "") -> None:
        """Shows it."""


def silent(done: int, total: int, note: str = "") -> None:
    """The `Update` that shows nothing."""


@contextmanager
def progress(title: str, every: float = 10.0) -> Iterator[Update]:
    """Shows `title` with what is done and the time left, on standard error.

    Args:
        title: what is being done, a few words.
        every: seconds between lines where standard error is not a terminal.

    Example:
        >>> with progress("reading films") as update:
        ...     for i in range(3):
        ...         update(i + 1, 3)
    """
    from rich.console import Console

    console = Console(stderr=True, highlight=False)
    with _bar(title, console) if console.is_terminal else _lines(title, console, every) as update:
        yield update


@contextmanager
def _bar(title: str, console: object) -> Iterator[Update]:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as bar:  # type: ignore[arg-type]
        task = bar.add_task(title, total=None, note="")

        def update(done: int, total: int, note: str = "") -> None:
            bar.update(task, completed=done, total=total, note=note)

        yield update


@contextmanager
def _lines(title: str, console: object, every: float) -> Iterator[Update]:
    start = time.monotonic()
    shown = start - every + 2.0
    calls, pace_start, pace_done = 0, start, 0

    def update(done: int, total: int, note: str = "") -> None:
        nonlocal shown, calls, pace_start, pace_done
        now = time.monotonic()
        calls += 1
        if calls <= 2:  # the first step of long work is slow (tracing, opening files) and says nothing of the others
            pace_start, pace_done = now, done
        if now - shown < every and done < total:
            return
        shown = now
        spent = now - start
        gone = done - pace_done
        left = f", {_clock((now - pace_start) * (total - done) / gone)} left" if gone > 0 and done < total else ""
        console.print(f"{title}: {done}/{total} in {_clock(spent)}{left}{'  ' + note if note else ''}", soft_wrap=True)  # type: ignore[attr-defined]

    yield update


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
