"""The other side of `input_pipeline.py`: films with masks and labels by torchvision's v2 transforms.

    python peer_supervised.py FOLDER [--size 320] [--batch-size 32] [--workers 2] [--seconds 10]

Needs torch and torchvision, and nothing of this project. FOLDER holds <n>.jpg, and <n>.png where a film has a mask.
Prints one line of JSON: films a second, and milliseconds of processor time a film, of this process and its workers.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from peer_two_views import measured


def transform(size: int) -> Any:
    """The ranges of `cxr_tf.Augment()`, as far as torchvision has them: film and mask at once."""
    import torch
    from torchvision import tv_tensors
    from torchvision.transforms import v2

    def gamma(image: Any) -> Any:
        return v2.functional.adjust_gamma(image, 1.2 ** float(torch.empty(()).uniform_(-1, 1)))

    return v2.Compose(
        [
            v2.Resize(size - 1, max_size=size, antialias=True),
            v2.CenterCrop(size),  # pads with black
            v2.RandomHorizontalFlip(),
            v2.RandomAffine(10, translate=(0.05, 0.05), scale=(0.9, 1.1)),
            v2.ColorJitter(brightness=0.1, contrast=0.2),
            v2.Lambda(gamma, tv_tensors.Image),
            v2.RandomApply([v2.GaussianBlur(7, (0.5, 1.5))], p=0.1),
            v2.ToDtype(torch.float32, scale=True),
            v2.RandomApply([v2.GaussianNoise(sigma=0.01)], p=0.5),
        ]
    )


class Films:
    """A map-style data set without end: item i is film i modulo their number."""

    def __init__(self, folder: str, size: int) -> None:
        self.files = sorted(Path(folder).glob("*.jpg"))
        self.size, self.transform = size, transform(size)

    def __len__(self) -> int:
        return 2**40

    def __getitem__(self, index: int) -> Any:
        """Film, mask and label."""
        import torch
        from torchvision import tv_tensors
        from torchvision.io import ImageReadMode, decode_image

        path = self.files[index % len(self.files)]
        film = tv_tensors.Image(decode_image(str(path), ImageReadMode.GRAY))
        mask_path = path.with_suffix(".png")
        if mask_path.is_file():
            mask = tv_tensors.Mask(decode_image(str(mask_path), ImageReadMode.GRAY))
            film, mask = self.transform(film, mask)
            return film.as_subclass(torch.Tensor), mask.as_subclass(torch.Tensor).float() / 255, index % 4
        film = self.transform(film)
        return film.as_subclass(torch.Tensor), torch.full((1, self.size, self.size), float("nan")), index % 4


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--size", type=int, default=320)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=10.0)
    arguments = parser.parse_args()

    import torch
    from torch.utils.data import DataLoader, SequentialSampler

    torch.set_num_threads(1)  # in the workers too: each has a core
    films: Any = Films(arguments.folder, arguments.size)
    loader = DataLoader(films, arguments.batch_size, sampler=SequentialSampler(films), num_workers=arguments.workers)
    rate, cost = measured(loader, arguments.seconds)
    print(json.dumps({"films_per_second": rate, "processor_ms": cost}))


if __name__ == "__main__":
    main()
