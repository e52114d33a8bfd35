"""What readers ask of the films themselves: where they lie, headers, and annotations held against the film's size."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from cxr_tf.data.manifest import Boxes, ManifestError, ManifestWarning, check_mask, clip_boxes
from cxr_tf.errors import CxrError

if TYPE_CHECKING:
    from cxr_tf.data.radiograph import Header

_THREADS = 16  # headers are a few kilobytes: what takes time is the disk, or the network behind it
_SLACK = 1.0  # pixels that a box may reach over the edge unremarked: rounding

Progress = Callable[[int, int], None]


def leads_out(path: str | os.PathLike[str], home: str) -> bool:
    """Whether a path, its links followed, lies outside of a folder.

    Args:
        path: of a file or folder.
        home: the folder as `os.path.realpath` gives it: worked out once for many paths.
    """
    return not Path(os.path.realpath(path)).is_relative_to(home)


def read_headers(paths: Sequence[str], progress: Progress | None = None) -> list[Header | None]:
    """Reads the headers of many films.

    Args:
        paths: the files.
        progress: called with (done, total).

    Returns:
        A header per file, None where it cannot be read.
    """
    headers = []
    with ThreadPoolExecutor(_THREADS) as threads:
        for header in threads.map(_header, paths):
            headers.append(header)
            if progress:
                progress(len(headers), len(paths))
    return headers


def _header(path: str) -> Header | None:
    from cxr_tf.data.radiograph import read_header

    try:
        return read_header(path)
    except CxrError:
        return None


def check_annotations(
    names: Iterable[str],
    headers: Iterable[Header | None],
    boxes: Iterable[Boxes],
    masks: Iterable[str | None],
) -> list[str]:
    """Holds boxes and masks against the sizes of their films; films whose header could not be read are passed over.

    Boxes that reach over an edge by more than rounding are counted in one `ManifestWarning`: they will be cut off.

    Args:
        names: what messages call the films.
        headers: from `read_headers`.
        boxes: of each film.
        masks: of each film, path or None.

    Returns:
        The problems: boxes without area or wholly outside, masks that are no PNG of their film's size.
    """
    problems, beyond = [], []
    for name, header, film_boxes, mask in zip(names, headers, boxes, masks, strict=True):
        if header is None:
            continue
        try:
            for box, clipped in zip(film_boxes, clip_boxes(film_boxes, header.height, header.width), strict=True):
                cut = max(clipped[0] - box[0], clipped[1] - box[1], box[0] + box[2] - clipped[0] - clipped[2])
                if max(cut, box[1] + box[3] - clipped[1] - clipped[3]) > _SLACK:
                    beyond.append(name)
            if mask is not None:
                check_mask(mask, header.height, header.width)
        except ManifestError as error:
            problems.append(f"{name}: {error}")
    if beyond:
        warnings.warn(
            f"{len(beyond)} boxes reach over the edge of their films and will be cut off there, the first: {beyond[0]}",
            ManifestWarning,
            stacklevel=3,
        )
    return problems
