"""How fast shards become batches, and what each way of storing a film costs.

COMMAND  python -m experiments.benchmarks.input_pipeline [SHARDS] [--peer-python PYTHON]
COST     three minutes on two cores with torchvision, one without
RESULT   on two virtual cores, 1,613 real films of up to 512 pixels, 10 % with a mask, to batches of 32 at 320 pixels:
             read and fitted   2,063 films/s   0.86 ms of processor a film
             and augmented       960 films/s   1.95 ms
             torchvision v2      282 films/s   7.04 ms
             times torchvision v2   3.42   (in each round: 3.42, 3.48, 3.42, 3.28, 3.31)
         with TF_NUM_INTRAOP_THREADS=0, TensorFlow's own number of threads an op: 1,459, 707 and 286 films/s; 2.46
         decoding, films/s a core: PNG 375, JPEG 812, zlib 644, raw 2,512

torchvision has the same films as JPEG of quality 95, which it decodes fastest, two worker processes, and one thread
each; it is measured in turn with the pipeline, and the ratio is the median over the rounds. As PNG it would pay more.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cxr_tf  # noqa: F401  (switches oneDNN on before TensorFlow is imported)

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")  # batches are made beside each other: each has a core

import numpy as np
import tensorflow as tf
from PIL import Image

from cxr_tf.data.augment import Augment
from cxr_tf.data.phantom import write_siim
from cxr_tf.data.pipeline import batches
from cxr_tf.data.readers.siim import read_siim
from cxr_tf.data.records import read_record
from cxr_tf.data.shards import ShardFolder, open_shards, prepare

_PEER = Path(__file__).with_name("peer_supervised.py")


def decoding(shards: ShardFolder, films: int = 100) -> Iterator[tuple[str, float, float]]:
    """Films a second and core, and kilobytes a film, of four lossless or nearly lossless ways to store them."""
    records = [tf.train.Example.FromString(record) for record in shards.read(range(min(films, len(shards))))]
    pixels = []
    for record in records:
        feature = record.features.feature
        shape = [feature[name].int64_list.value[0] for name in ("height", "width")]
        pixels.append(tf.reshape(tf.io.decode_raw(feature["image"].bytes_list.value[0], tf.uint8), [*shape, 1]))
    ways: dict[str, tuple[Callable[[Any], bytes], Callable[[Any], Any]]] = {
        "png": (lambda x: tf.io.encode_png(x).numpy(), lambda b: tf.io.decode_png(b, channels=1)),
        "jpeg, quality 95": (
            lambda x: tf.io.encode_jpeg(x, quality=95).numpy(),
            lambda b: tf.io.decode_jpeg(b, channels=1, dct_method="INTEGER_ACCURATE"),
        ),
        "zlib": (
            lambda x: zlib.compress(x.numpy().tobytes(), 6),
            lambda b: tf.io.decode_raw(tf.io.decode_compressed(b, "ZLIB"), tf.uint8),
        ),
        "raw": (lambda x: x.numpy().tobytes(), lambda b: tf.io.decode_raw(b, tf.uint8)),
    }
    for name, (encode, decode) in ways.items():
        stored = [tf.constant(encode(film)) for film in pixels]
        run = tf.function(decode, input_signature=[tf.TensorSpec([], tf.string)])
        run(stored[0])
        start = time.perf_counter()
        for film in stored:
            run(film)
        rate = len(stored) / (time.perf_counter() - start)
        yield name, rate, sum(len(film.numpy()) for film in stored) / len(stored) / 1e3


def throughput(dataset: tf.data.Dataset, batch_size: int, seconds: float) -> tuple[float, float]:
    """Films a second, and milliseconds of processor time a film, once the buffers have been filled and emptied."""
    iterator = iter(dataset)
    for _ in range(8):
        next(iterator)
    films, wall, processor = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - wall < seconds:
        next(iterator)
        films += batch_size
    return films / (time.perf_counter() - wall), 1e3 * (time.process_time() - processor) / films


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", nargs="?", help="folder of shards; generated radiographs by default")
    parser.add_argument("--size", type=int, default=320)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=10.0, help="length of each measurement")
    parser.add_argument("--peer-python", help="interpreter that has torch and torchvision")
    parser.add_argument("--rounds", type=int, default=5, help="beside torchvision")
    arguments = parser.parse_args()
    with _shards(arguments.shards) as shards:
        drawn = shards.manifest["boxes"].map(bool) | shards.manifest["mask"].notna()
        annotated = (shards.manifest["mask_known"] & drawn).mean()
        print(f"{len(shards)} films of up to {shards.storage_size} pixels, {annotated:.0%} with a mask")
        print(f"{'stored as':24} {'films/s a core':>15} {'kB a film':>10}")
        for name, rate, size in decoding(shards):
            print(f"{name:24} {rate:15,.0f} {size:10,.0f}", flush=True)
        print(f"{f'batches of {arguments.size} pixels':24} {'films/s':>15} {'CPU ms a film':>14}", flush=True)

        def made(augment: Augment | None) -> tf.data.Dataset:
            return batches(
                shards, range(len(shards)), size=arguments.size, batch_size=arguments.batch_size, augment=augment
            )

        rate, cost = throughput(made(None), arguments.batch_size, arguments.seconds)
        print(f"{'read and fitted':24} {rate:15,.0f} {cost:14.2f}", flush=True)
        if arguments.peer_python is None:
            rate, cost = throughput(made(Augment()), arguments.batch_size, arguments.seconds)
            print(f"{'and augmented':24} {rate:15,.0f} {cost:14.2f}")
            return
        ours, theirs = [], []
        with tempfile.TemporaryDirectory() as files:
            write_files(shards, Path(files))
            for _ in range(arguments.rounds):
                ours.append(throughput(made(Augment()), arguments.batch_size, arguments.seconds))
                theirs.append(peer(arguments.peer_python, files, arguments))
        for name, rounds in (("and augmented", ours), ("torchvision v2", theirs)):
            rate, cost = (statistics.median(values) for values in zip(*rounds, strict=True))
            print(f"{name:24} {rate:15,.0f} {cost:14.2f}")
        ratios = [mine[0] / other[0] for mine, other in zip(ours, theirs, strict=True)]
        shown = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        print(f"{'times torchvision v2':24} {statistics.median(ratios):15.2f}   (in each round: {shown})")


def write_files(shards: ShardFolder, folder: Path) -> None:
    """Films as JPEG of quality 95, and masks as PNG, where a film has one: what torchvision decodes fastest."""
    for key, record in enumerate(shards.read(range(len(shards)))):
        film = read_record(record)
        Image.fromarray(film.image).save(folder / f"{key:06}.jpg", quality=95)
        if film.known:
            mask = np.zeros_like(film.image) if film.mask is None else 255 * film.mask
            Image.fromarray(mask).save(folder / f"{key:06}.png")


def peer(python: str, folder: str, arguments: argparse.Namespace) -> tuple[float, float]:
    """Films a second, and milliseconds of processor time a film, of the other side."""
    settings = [f"--{name.replace('_', '-')}={getattr(arguments, name)}" for name in ("size", "batch_size", "seconds")]
    ended = subprocess.run(
        [python, _PEER, folder, f"--workers={os.cpu_count()}", *settings], capture_output=True, text=True, check=False
    )
    if ended.returncode:
        raise SystemExit(f"the peer failed:\n{ended.stderr}")
    found = json.loads(ended.stdout.splitlines()[-1])
    return found["films_per_second"], found["processor_ms"]


@contextmanager
def _shards(folder: str | None) -> Iterator[ShardFolder]:
    if folder is not None:
        yield open_shards(folder)
        return
    with tempfile.TemporaryDirectory() as scratch:
        root = write_siim(Path(scratch) / "films", studies=200, size=640)
        yield prepare(read_siim(root), Path(scratch) / "shards", shard_size=64)


if __name__ == "__main__":
    main()
