"""Whether time a film and memory stay the same from 2,000 films to 100,000, and what `prepare` makes of two cores.

COMMAND  python -m experiments.benchmarks.scale [--films 2000 20000 100000] [--rounds 3]
COST     half an hour on two cores, 7 minutes of it the audit of 100,000 films; 6 GB of scratch space
RESULT   on two virtual cores, three rounds:
         400 DICOM films of 2048 x 2048 pixels
                                         ms a film   s to the first
         one process                          43.6              0.1
         2 processes                          23.4              1.0
         2 alone, beside each other           39.6              0.1
         plain loop                           51.1              0.0
         parallel efficiency                  0.95   (in each round: 0.74, 0.98, 0.95)
         of what the machine gives            0.86   (in each round: 0.86, 0.76, 0.86)
         times a plain loop, with start       1.97   (in each round: 1.92, 1.97, 2.04)
            films stage       ms a film      MB  MB of each reader
            2,000 prepare          3.08     169                158
            2,000 audit            3.03     181                168
            2,000 epoch            0.34     913                  0
           20,000 prepare          2.01     208                162
           20,000 audit            2.89     236                193
           20,000 epoch            0.18     933                  0
          100,000 prepare          1.22     383                162
          100,000 audit            3.96     430                318
          100,000 epoch            0.23   1,011                  0
         Nothing grows with the number of films but the audit's comparing, which goes by pairs: of its 3.96 ms a film at
         100,000, 2.4 are reading and 1.6 comparing. (Start-up is 3 seconds of the small sets; rates vary twofold from
         run to run on this machine: prepare took 1.58, 1.15 and 0.99 ms in another.) Memory grows by the table of the
         films, 2 KB each in prepare, and by the hashes in the audit, 1 KB each and as much for the tables.

Two things are measured, each in a process of its own.

1. `prepare`, `audit` and one epoch of the pipeline (shuffled, augmented, batches of 64) on sets of generated films of
   128 pixels: wall time a film, and the most memory the process took, and each of those that it started. A film is a
   blend of two generated ones, so that any number is quickly made, and bent, so that two of them are as unlike as two
   real ones are (the median distance of their hashes is 119 bits of 256; 122 among the real films of docs/data.md).
2. `prepare` of generated DICOM films of real size (2,048 pixels, 12 of 16 bits, uncompressed) with one process and with
   one a core, and the loop that one would write first: pydicom, its modality and VOI functions, Pillow's `resize`, the
   pixels to a file. Parallel efficiency is the time with one process by that with all, by their number. Cores share
   memory and caches: so many processes that each do it all alone, beside each other, show what the machine has to give.
   All in turn; a figure is the median over the rounds. Starting processes takes what it takes, whatever the number of
   films: efficiency is from the first film to the last, and what comes before it is printed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")  # as in input_pipeline.py

import numpy as np
import pandas as pd
import pydicom
from PIL import Image
from scipy import ndimage

from cxr_tf.data.audit import audit
from cxr_tf.data.manifest import load_manifest, make_manifest, save_manifest
from cxr_tf.data.phantom import CLASSES, phantom
from cxr_tf.data.shards import open_shards, prepare
from cxr_tf.progress import progress

_SMALL, _ORIGINALS = 128, 256  # side of the many films, and how many they are blended from
_LARGE, _PIXELS = 400, 2048  # how many films of real size, and their side
_STORED = 512


@cache
def _original(number: int) -> np.ndarray:
    return phantom(CLASSES[number % len(CLASSES)], np.random.default_rng(number), _SMALL).pixels / 16.0


def _write_blend(job: tuple[Path, int]) -> None:
    path, number = job
    rng = np.random.default_rng([number, 7])
    first, second = rng.choice(_ORIGINALS, 2, replace=False)
    part = rng.uniform(0.4, 0.6)
    pixels = part * _original(int(first)) + (1 - part) * _original(int(second))
    middle = (_SMALL - 1) / 2
    place = np.stack(np.meshgrid(*[np.arange(_SMALL) - middle] * 2, indexing="ij"))
    linear = np.eye(2) + rng.normal(0, 0.08, (2, 2))
    bend = [ndimage.zoom(rng.normal(0, 5, (5, 5)), _SMALL / 5, mode="nearest", grid_mode=True) for _ in range(2)]
    pixels = ndimage.map_coordinates(
        pixels, np.einsum("ij,jhw->ihw", linear, place) + middle + bend, order=1, mode="nearest"
    ) + rng.normal(0, 2, (_SMALL, _SMALL))
    Image.fromarray(np.uint8(np.clip(np.rint(pixels), 0, 255))).save(path, quality=95)


def _write_dicom(job: tuple[Path, int]) -> None:
    from pydicom.dataset import FileMetaDataset

    path, number = job
    film = phantom(CLASSES[number % len(CLASSES)], np.random.default_rng(number), 512).pixels.astype(np.uint16)
    pixels = np.kron(film, np.ones((_PIXELS // 512, _PIXELS // 512), np.uint16))
    dataset = pydicom.Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.1.1"
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid(
        None, [str(number)]
    )
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.Rows, dataset.Columns, dataset.SamplesPerPixel = *pixels.shape, 1
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 12, 11, 0
    dataset.WindowCenter, dataset.WindowWidth = 2048, 4096
    dataset.PixelData = pixels.tobytes()
    dataset.save_as(path, enforce_file_format=True)


def make_films(folder: Path, films: int, write: Callable[[tuple[Path, int]], None], ending: str) -> Path:
    """Films in files of their own, and the manifest of them."""
    (folder / "films").mkdir(parents=True)
    paths = [folder / "films" / f"{number:06}.{ending}" for number in range(films)]
    with progress(f"making {films:,} films") as update, ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        for done, _ in enumerate(pool.map(write, zip(paths, range(films), strict=True), chunksize=32), start=1):
            update(done, films)
    manifest = make_manifest(
        {
            "image": [str(path.resolve()) for path in paths],
            "source": ["generated"] * films,
            **{name: [str(number) for number in range(films)] for name in ("patient_id", "study_id")},
            **{name: [None] * films for name in ("view", "sex", "mask")},
            "age": [float("nan")] * films,
            **{
                f"label:{name}": np.eye(len(CLASSES))[i, np.arange(films) % len(CLASSES)]
                for i, name in enumerate(CLASSES)
            },
            "boxes": [[]] * films,
            "mask_known": [False] * films,
            "split": np.where(np.arange(films) % 5 == 0, "test", "train").tolist(),
        }
    )
    save_manifest(manifest, folder / "manifest.csv")
    return folder / "manifest.csv"


def plain_loop(manifest: pd.DataFrame, out: Path) -> None:
    """What one would write first: no mask, no label, no check, one process."""
    from pydicom.pixels import apply_modality_lut, apply_voi_lut

    with out.open("wb") as file:
        for path in manifest["image"]:
            dataset = pydicom.dcmread(path)
            pixels = apply_voi_lut(apply_modality_lut(dataset.pixel_array, dataset), dataset).astype(np.float32)
            pixels = 255 * (pixels - pixels.min()) / (pixels.max() - pixels.min())
            if dataset.PhotometricInterpretation == "MONOCHROME1":
                pixels = 255 - pixels
            image = Image.fromarray(pixels.astype(np.uint8))
            file.write(image.resize((_STORED, _STORED), Image.Resampling.BILINEAR).tobytes())


def stage(name: str, folder: Path, workers: int | None) -> dict[str, float]:
    """Does one thing, and says how long it took and how much memory."""
    manifest = load_manifest(folder / "manifest.csv") if name in ("prepare", "plain loop") else None
    child, first = [0.0], 0.0
    threading.Thread(target=_watch, args=(child,), daemon=True).start()
    start = time.perf_counter()
    if name == "prepare":
        assert manifest is not None

        def tick(done: int, total: int) -> None:
            nonlocal first
            first = first or time.perf_counter() - start
            update(done, total)

        with progress(name) as update, tempfile.TemporaryDirectory(dir=folder) as scratch:
            prepare(manifest, Path(scratch) / "shards", storage_size=_STORED, workers=workers, progress=tick)
            seconds = time.perf_counter() - start
            if workers is None and not (folder / "shards").exists():
                (Path(scratch) / "shards").rename(folder / "shards")
    elif name == "plain loop":
        assert manifest is not None
        plain_loop(manifest, folder / "plain.raw")
        seconds = time.perf_counter() - start
    elif name == "audit":
        with progress(name) as update:
            found = audit([folder / "shards"], folder / "audit", progress=update)
        seconds = time.perf_counter() - start
        assert not len(found.unread)
        print(f"{len(found.pairs)} pairs", file=sys.stderr)
    else:
        from cxr_tf.data.augment import Augment
        from cxr_tf.data.pipeline import batches

        shards = open_shards(folder / "shards")
        steps = len(shards) // 64 + 1  # the first compiles
        for step, _ in enumerate(
            batches(shards, range(len(shards)), size=_SMALL, batch_size=64, steps=steps, augment=Augment())
        ):
            if step == 0:
                start = time.perf_counter()
        seconds = time.perf_counter() - start
    return {"seconds": seconds, "start": first, "mb": _most("self"), "mb_child": child[0]}


def _most(process: str) -> float:
    """The most memory that a process has had, in MB. (`getrusage` counts what its parent had when it started it.)"""
    return int(Path(f"/proc/{process}/status").read_text().partition("VmHWM:")[2].split()[0]) / 1024


def _watch(most: list[float]) -> None:
    """Keeps the most memory that any child has had."""
    while True:
        for task in Path("/proc/self/task").iterdir():
            with suppress(OSError, IndexError):
                most[0] = max([most[0], *map(_most, (task / "children").read_text().split())])
        time.sleep(0.1)


def _measured(name: str, folder: Path, workers: int | None = None) -> dict[str, Any]:
    command = [sys.executable, "-m", "experiments.benchmarks.scale", "--stage", name, str(folder)]
    if workers is not None:
        command += ["--workers", str(workers)]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if ended.returncode:
        raise SystemExit(f"{name} failed")
    return json.loads(ended.stdout.splitlines()[-1])


def flatness(scratch: Path, counts: list[int]) -> None:
    """Prints milliseconds a film and memory of three stages for each number of films."""
    print(f"{'films':>8} {'stage':10} {'ms a film':>10} {'MB':>7} {'MB of each reader':>18}")
    for films in counts:
        folder = scratch / str(films)
        make_films(folder, films, _write_blend, "jpg")
        for name in ("prepare", "audit", "epoch"):
            found = _measured(name, folder)
            print(
                f"{films:8,} {name:10} {1e3 * found['seconds'] / films:10.2f} {found['mb']:7,.0f} "
                f"{found['mb_child']:18,.0f}",
                flush=True,
            )


def parallel(scratch: Path, rounds: int) -> None:
    """Prints how `prepare` uses the cores, and how it compares with a plain loop."""
    folder = scratch / "large"
    cores = os.cpu_count() or 1
    make_films(folder, _LARGE, _write_dicom, "dcm")
    sides: dict[str, Callable[[], dict[str, Any]]] = {
        "one process": lambda: _measured("prepare", folder, 1),
        f"{cores} processes": lambda: _measured("prepare", folder, cores),
        f"{cores} alone, beside each other": lambda: _beside(folder, cores),
        "plain loop": lambda: _measured("plain loop", folder),
    }
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side, measure in sides.items():
            found[side].append(measure())
    print(f"\n{_LARGE} DICOM films of {_PIXELS} x {_PIXELS} pixels")
    print(f"{'':30} {'ms a film':>10} {'s to the first':>16}")
    for side, rows in found.items():
        each = [1e3 * (row["seconds"] - row["start"]) / _LARGE for row in rows]
        print(f"{side:30} {statistics.median(each):10.1f} {statistics.median(row['start'] for row in rows):16.1f}")
    steady = {side: [row["seconds"] - row["start"] for row in rows] for side, rows in found.items()}
    one, many, beside, _ = steady.values()
    whole = [[row["seconds"] for row in rows] for rows in found.values()]
    for title, numbers in (
        ("parallel efficiency", [a / b / cores for a, b in zip(one, many, strict=True)]),
        ("of what the machine gives", [a / b / cores for a, b in zip(beside, many, strict=True)]),
        ("times a plain loop, with start", [a / b for a, b in zip(whole[3], whole[1], strict=True)]),
    ):
        shown = ", ".join(f"{number:.2f}" for number in numbers)
        print(f"{title:30} {statistics.median(numbers):10.2f}   (in each round: {shown})")


def _beside(folder: Path, cores: int) -> dict[str, Any]:
    """One process of as many as there are cores, each of which prepares all films on its own."""
    with ThreadPoolExecutor(cores) as threads:
        found = list(threads.map(lambda _: _measured("prepare", folder, 1), range(cores)))
    return {name: statistics.mean(each[name] for each in found) for name in ("seconds", "start")}


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--films", type=int, nargs="*", default=[2000, 20_000, 100_000])
    parser.add_argument("--rounds", type=int, default=3, help="of prepare and the plain loop")
    parser.add_argument("--stage", nargs=2, metavar=("NAME", "FOLDER"), help=argparse.SUPPRESS)
    parser.add_argument("--workers", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.stage:
        name, folder = arguments.stage
        print(json.dumps(stage(name, Path(folder), arguments.workers)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        if arguments.rounds:
            parallel(Path(scratch), arguments.rounds)
        flatness(Path(scratch), arguments.films)


if __name__ == "__main__":
    main()
