"""Work shared out among processes, its results in order."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, TypeVar

from cxr_tf.errors import CxrError

Task = TypeVar("Task")
Result = TypeVar("Result")


class ProcessError(CxrError):
    """A process that was ended from outside."""


@contextmanager
def ordered_processes(
    function: Callable[[Task], Result],
    workers: int,
    begin: Callable[..., object] | None = None,
    arguments: tuple[Any, ...] = (),
) -> Iterator[Callable[[Iterable[Task]], Iterator[Result]]]:
    """Gives a lazy `map(function, tasks)` that runs in several processes.

    Few results are made ahead of the one that is asked for, so they take little memory. Processes are spawned, for
    TensorFlow's threads do not survive a fork; a script that uses this needs Python's usual
    `if __name__ == "__main__":`. They end with this process, even if it is killed.

    Args:
        function: of one task; a function of a module.
        workers: processes; with one or none the work is done in this one.
        begin: called first in each process, with `arguments`.
        arguments: of `begin`.

    Raises:
        ProcessError: when a process is ended from outside.

    Example:
        >>> with ordered_processes(read_radiograph, workers=4) as read:  # doctest: +SKIP
        ...     for pixels in read(paths):
        ...         print(pixels.shape)
    """
    if workers <= 1:
        if begin is not None:
            begin(*arguments)
        yield lambda tasks: map(function, tasks)
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _begin, (begin, arguments))

    def run(tasks: Iterable[Task]) -> Iterator[Result]:
        ahead: deque[Future[Result]] = deque()
        for task in tasks:
            ahead.append(pool.submit(function, task))
            if len(ahead) >= 4 * workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()

    try:
        yield run
    except BrokenProcessPool as error:
        raise ProcessError(
            "a process that reads films was ended from outside, most often because memory ran out. Use fewer workers, "
            'or lower max_megapixels. (A script that starts processes needs `if __name__ == "__main__":`.)'
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(begin: Callable[..., object] | None, arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if begin is not None:
        begin(*arguments)


def _end_with_parent() -> None:
    """A parent that is killed cannot end its pool, whose processes would wait for work for ever."""
    parent = multiprocessing.parent_process()
    # `join` waits for the end of a pipe, which stays open as long as any process has it that the parent forked.
    while parent is not None and os.getppid() == parent.pid:
        parent.join(1.0)
    os._exit(1)
