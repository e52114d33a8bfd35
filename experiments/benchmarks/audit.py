"""How many planted twins `cxr-tf audit` finds among many films, how many pairs it names wrongly, and what it costs.

COMMAND  python -m experiments.benchmarks.audit FOLDER [--films 20000] [--keep SCRATCH]
COST     about ten minutes on two cores, most of it for making the films; with --keep they are made once
RESULT   20,000 films, of which 1,613 real ones of up to 512 pixels, on two virtual cores:
             112 s, 157 s of processor (7.9 ms a film); 289 MB, and 215 MB in each of two processes that read
             (78 s and 145 s in another hour: the machine is shared)
             all twins: 1,998 of 2,000 found (99.90 %); with all changes at once 498 of 500 of real films, 485 of 485
             of generated ones; all with one change alone
             pairs named: 1,998, of which not planted: 0

FOLDER holds real films as JPEG or PNG files, in it or below. Generated ones make up the number. Of the films, 2,000 (a
tenth, if there are fewer than 20,000) are twins of others, half of them of real films: half have all four changes at
once, an eighth each of them alone. The changes are JPEG quality 50 to 95; size 50 to 100 %; contrast 90 to 110 %; up
to 5 % cropped from each of the four sides. All is prepared as shards, and the time is that of the audit from these:
reading, hashing, comparing, writing the page. Planted twins are the split "test", the others "train".
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
from PIL import Image

from cxr_tf.data.audit import audit
from cxr_tf.data.manifest import make_manifest
from cxr_tf.data.phantom import CLASSES, phantom
from cxr_tf.data.shards import ShardFolder, open_shards, prepare
from cxr_tf.progress import progress

_CHANGES = ("all", "quality", "size", "contrast", "crop")
_SHARES = (4, 1, 1, 1, 1)


def changed(pixels: np.ndarray, change: str, rng: np.random.Generator) -> tuple[np.ndarray, int]:
    """Another export of a film, uint8 `[height, width]`, and the JPEG quality to save it with."""
    quality, size, contrast = int(rng.integers(50, 96)), rng.uniform(0.5, 1), rng.uniform(0.9, 1.1)
    crop = rng.uniform(0, 0.05, 4)
    height, width = pixels.shape
    if change in ("all", "crop"):
        rows = slice(round(crop[0] * height), height - round(crop[1] * height))
        pixels = pixels[rows, round(crop[2] * width) : width - round(crop[3] * width)]
    if change in ("all", "contrast"):
        pixels = np.rint(np.clip(128 + (pixels - 128.0) * contrast, 0, 255)).astype(np.uint8)
    if change in ("all", "size"):
        smaller = [max(1, round(side * size)) for side in pixels.shape[::-1]]
        pixels = np.asarray(Image.fromarray(pixels).resize((smaller[0], smaller[1]), Image.Resampling.BICUBIC))
    return pixels, quality if change in ("all", "quality") else 95


def _make(job: tuple[Path, Path | None, str | None, int, int]) -> None:
    """Writes one film: a real one or a generated one, as it is or changed."""
    path, real, change, seed, size = job
    if real is not None:
        with Image.open(real) as image:
            pixels = np.asarray(image.convert("L"))
    else:
        film = phantom(CLASSES[seed % len(CLASSES)], np.random.default_rng(seed), size)
        pixels = (film.pixels >> 4).astype(np.uint8)
    quality = 95
    if change is not None:
        pixels, quality = changed(pixels, change, np.random.default_rng([seed, 1]))
    Image.fromarray(pixels).save(path, quality=quality)


def make_films(folder: Path, films: int, scratch: Path, size: int) -> ShardFolder:
    """Shards of real and generated films and twins of them; the columns `original` and `change` tell which."""
    real = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    twins = min(2000, films // 10)
    real = real[: (films - twins) // 2]
    if not real or twins < 2:
        raise SystemExit(f"{folder} holds no JPEG or PNG file, or --films is too small. Received: {films}")
    rng = np.random.default_rng(0)
    originals = films - twins
    of_real = rng.permutation(len(real))[: twins // 2]
    of_generated = len(real) + rng.permutation(originals - len(real))[: twins - len(of_real)]
    original = [*range(originals), *of_real.tolist(), *of_generated.tolist()]
    change = [None] * originals + rng.choice(_CHANGES, twins, p=np.divide(_SHARES, sum(_SHARES))).tolist()

    (scratch / "films").mkdir(parents=True, exist_ok=True)
    paths = [scratch / "films" / f"{i}.jpg" for i in range(films)]
    sources = [real[i] if i < len(real) else None for i in original]
    jobs = zip(paths, sources, change, original, [size] * films, strict=True)
    with progress("making films") as update, ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        for done, _ in enumerate(pool.map(_make, jobs, chunksize=16), start=1):
            update(done, films)
    manifest = make_manifest(
        {
            "image": [str(path.resolve()) for path in paths],
            "source": ["real" if path else "generated" for path in sources],
            **{name: [str(i) for i in range(films)] for name in ("patient_id", "study_id")},
            **{name: [None] * films for name in ("view", "sex", "mask")},
            "age": [float("nan")] * films,
            "label:none": [float("nan")] * films,
            "boxes": [[]] * films,
            "mask_known": [False] * films,
            "split": ["train"] * originals + ["test"] * twins,
            "original": [str(i) for i in original],
            "change": change,
        }
    )
    with progress("preparing films") as update:
        return prepare(manifest, scratch / "shards", progress=update)


def _cpu() -> float:
    """Seconds of processor that this process and the ended ones that it started have used."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of real films")
    parser.add_argument("--films", type=int, default=20_000)
    parser.add_argument("--size", type=int, default=192, help="side of the generated films in pixels")
    parser.add_argument("--keep", type=Path, help="folder for films, shards and page, used again if they are there")
    arguments = parser.parse_args()
    with _scratch(arguments.keep) as scratch:
        if (scratch / "shards" / "shards.json").exists():
            shards = open_shards(scratch / "shards")
        else:
            shards = make_films(arguments.folder, arguments.films, scratch, arguments.size)
        wall, processor = time.perf_counter(), _cpu()
        with progress("auditing films") as update:
            found = audit([shards.folder], scratch / "audit", progress=update)
        wall, processor = time.perf_counter() - wall, _cpu() - processor

    films = len(shards)
    original, change = shards.manifest["original"].to_numpy(), shards.manifest["change"].to_numpy()
    first, second = found.pairs["first_row"].to_numpy(), found.pairs["second_row"].to_numpy()
    right = original[first] == original[second]
    caught = set(np.concatenate([first[right], second[right]]).tolist())
    print(f"{films:,} films: {wall:.0f} s, {processor:.0f} s of processor ({1e3 * processor / films:.1f} ms a film)")
    memory = [resource.getrusage(who).ru_maxrss / 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    print(f"memory: {memory[0]:,.0f} MB, and up to {memory[1]:,.0f} MB in each process that reads")
    for name in _CHANGES:
        for source in ("real", "generated"):
            planted = np.flatnonzero((change == name) & (shards.manifest["source"] == source).to_numpy())
            hits = len(caught.intersection(planted.tolist()))
            if len(planted):
                print(f"twins of {source} films, {name}: {hits} of {len(planted)} found ({hits / len(planted):.2%})")
    planted = np.flatnonzero([name is not None for name in change])
    hits = len(caught.intersection(planted.tolist()))
    print(f"all twins: {hits} of {len(planted)} found ({hits / len(planted):.2%}); audit failed: {found.failed}")
    wrong = found.pairs[~right]
    print(f"pairs named: {len(found.pairs)}, of which not planted: {len(wrong)}")
    for pair in wrong.itertuples():
        print(json.dumps([pair.kind, pair.correlation, pair.first_row, pair.second_row]))


@contextmanager
def _scratch(folder: Path | None) -> Iterator[Path]:
    if folder is not None:
        yield folder
        return
    with tempfile.TemporaryDirectory() as scratch:
        yield Path(scratch)


if __name__ == "__main__":
    main()
