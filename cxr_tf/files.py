"""Writing files so that a killed process leaves the old one or the new one, never half of one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cxr_tf.errors import CxrError


class WriteError(CxrError):
    """A folder or file that cannot be written; the text says which, and why."""


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a temporary path beside `path` (same endings), for a file or a folder; a block that ends well renames it.

    Raises:
        WriteError: when it cannot be written.

    Example:
        >>> with replacing("metrics.json") as temporary:  # doctest: +SKIP
        ...     temporary.write_text("{}")
    """
    target = Path(path)
    temporary = target.with_name(f".partial-{os.getpid()}-{target.name}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        if target.is_dir() and temporary.is_dir():
            shutil.rmtree(target)
        temporary.replace(target)
    except OSError as error:
        raise WriteError(f"{target}: cannot be written ({error.strerror or error}).") from error
    finally:
        with suppress(OSError):
            shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink(missing_ok=True)


def writable_folder(path: str | os.PathLike[str], need_bytes: int = 0) -> Path:
    """Makes a folder and proves that it can be written and has room.

    Args:
        path: the folder.
        need_bytes: how much will be written there.

    Raises:
        WriteError: when it cannot be made or written, or has less room than that.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.write_bytes(b"")
        probe.unlink()
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise WriteError(f"{folder}: cannot be written ({error.strerror or error}). Give another folder.") from error
    if free < need_bytes:
        raise WriteError(
            f"{folder}: {need_bytes / 1e6:,.0f} MB will be written there, and {free / 1e6:,.0f} MB are free. "
            "Make room, give another folder, or keep fewer checkpoints."
        )
    return folder
