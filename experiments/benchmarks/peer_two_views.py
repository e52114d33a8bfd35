"""The other side of `two_views.py`: two views of each film by torchvision and lightly, in an environment of their own.

    python peer_two_views.py FOLDER {moco_cxr,moco_v2} [--size 224] [--batch-size 32] [--workers 2] [--seconds 10]

Needs torch, torchvision and lightly, and nothing of this project. Prints one line of JSON: pairs a second, and
milliseconds of processor time a pair, of this process and its workers.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def transform(views: str, size: int) -> tuple[Callable[[Any], Any], str]:
    """A film to two views, and the mode that films are read in."""
    if views == "moco_v2":
        from lightly.transforms import MoCoV2Transform

        return MoCoV2Transform(input_size=size), "RGB"
    from torchvision import transforms

    view = transforms.Compose(
        [
            transforms.Resize(size),
            transforms.RandomHorizontalFlip(),
            transforms.RandomRotation(10),
            transforms.RandomResizedCrop(size, scale=(0.8, 1.0)),
            transforms.ToTensor(),
            transforms.Normalize([0.502], [0.0856]),
        ]
    )
    return lambda image: (view(image), view(image)), "L"


class Films:
    """A folder of JPEGs as a map-style data set, without end: item i is film i modulo their number."""

    def __init__(self, folder: str, views: str, size: int) -> None:
        self.files = sorted(path for path in Path(folder).iterdir() if path.suffix.lower() in (".jpg", ".jpeg"))
        self.transform, self.mode = transform(views, size)

    def __len__(self) -> int:
        return 2**40

    def __getitem__(self, index: int) -> Any:
        """Two views of one film."""
        from PIL import Image

        with Image.open(self.files[index % len(self.files)]) as image:
            return self.transform(image.convert(self.mode))


def processor_seconds(processes: list[int]) -> float:
    """User and system time that these processes have used so far."""
    fields = [Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split() for process in processes]
    return sum(int(field[11]) + int(field[12]) for field in fields) / os.sysconf("SC_CLK_TCK")


def measured(loader: Any, seconds: float) -> tuple[float, float]:
    """Items a second, and milliseconds of processor time an item, of this process and the loader's workers."""
    batches = iter(loader)
    for _ in range(3 * loader.num_workers):  # until what was made ahead has been used up
        next(batches)
    processes = [os.getpid(), *(worker.pid for worker in getattr(batches, "_workers", []))]
    items, wall, processor = 0, time.perf_counter(), processor_seconds(processes)
    while time.perf_counter() - wall < seconds:
        items += len(next(batches)[0])
    taken = time.perf_counter() - wall
    return items / taken, 1e3 * (processor_seconds(processes) - processor) / items


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("views", choices=["moco_cxr", "moco_v2"])
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=10.0)
    arguments = parser.parse_args()

    from torch.utils.data import DataLoader, SequentialSampler

    films: Any = Films(arguments.folder, arguments.views, arguments.size)
    loader = DataLoader(films, arguments.batch_size, sampler=SequentialSampler(films), num_workers=arguments.workers)
    rate, cost = measured(loader, arguments.seconds)
    print(json.dumps({"pairs_per_second": rate, "processor_ms": cost}))


if __name__ == "__main__":
    main()
