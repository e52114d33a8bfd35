"""Damaged films: how many of many mutated DICOM, PNG and JPEG files are read, refused, or worse.

COMMAND  python -m experiments.benchmarks.faults
COST     ten seconds on two quiet cores
RESULT            files    read  refused  worse
         dicom   14,224   1,973   12,251      0
         png      6,220      28    6,192      0
         jpeg     3,556     650    2,906      0

Seeds are one small film in 27 encodings: DICOM uncompressed (8, 12, 15 and 16 bits, signed, implicit, big endian,
inverted with window and padding, with lookup tables, without preamble), deflated, RLE, JPEG, JPEG 2000, and JPEG-LS
where its encoder is installed; PNG of 1, 8 and 16 bits, in color, palette and with transparency; JPEG gray, color, CMYK
and progressive. Half of the damaged PNG files get right checksums again, which would refuse them. A mutation
overwrites, deletes, repeats or inserts bytes, cuts the file off, or joins it to another one, one to four times; half of
them strike the first 600 bytes, where sizes are. A file depends on its number alone, and one that is worse than refused
is written to --keep.

"Worse" is an exception that is not ours, more than 5 seconds, or more than 1 GB of memory, with the bound at 16
megapixels.
"""

from __future__ import annotations

import argparse
import io
import os
import resource
import signal
import time
import warnings
import zlib
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from PIL import Image
from pydicom import uid

from cxr_tf.data.phantom import phantom
from cxr_tf.data.radiograph import RadiographError, read_radiograph

_MEGAPIXELS, _SECONDS, _BYTES = 16.0, 5.0, 10**9
_CHUNK = 200  # files a task


def seeds() -> dict[str, bytes]:
    """Name -> a whole file of each kind."""
    gray = (phantom("Typical Appearance", np.random.default_rng(0), 64).pixels >> 4).astype(np.uint8)
    found: dict[str, bytes] = {}

    def picture(name: str, image: Image.Image, form: str, **settings: Any) -> None:
        stream = io.BytesIO()
        image.save(stream, form, **settings)
        found[name] = stream.getvalue()

    one = Image.fromarray(gray)
    for mode in ("L", "RGB", "P", "RGBA", "LA", "1"):
        picture(f"png {mode}", one.convert(mode), "PNG")
    picture("png 16 bits", Image.fromarray(gray.astype(np.uint16) << 8), "PNG")
    picture("jpeg gray", one, "JPEG")
    picture("jpeg color", one.convert("RGB"), "JPEG")
    picture("jpeg progressive", one, "JPEG", progressive=True)
    picture("jpeg cmyk", one.convert("CMYK"), "JPEG")
    for bits, signed in ((8, 0), (12, 0), (15, 0), (16, 0), (16, 1)):
        found[f"dicom {bits} bits{' signed' if signed else ''}"] = _bytes(_dicom(gray, bits, signed))
    film = _dicom(gray, 12, 0)
    film.WindowCenter, film.WindowWidth = 2000, 3000
    film.PhotometricInterpretation, film.PixelPaddingValue = "MONOCHROME1", 0
    found["dicom window, MONOCHROME1"] = _bytes(film)
    table = pydicom.Dataset()
    table.LUTDescriptor, table.LUTData = [4096, 0, 12], np.arange(4096, dtype=np.uint16).tobytes()
    film = _dicom(gray, 12, 0)
    film.VOILUTSequence = [table]
    found["dicom lookup table"] = _bytes(film)
    film = _dicom(gray, 12, 0)
    film.ModalityLUTSequence, film.VOILUTFunction = [table], "SIGMOID"
    film.WindowCenter, film.WindowWidth = [2000, 1000], [3000, 500]
    found["dicom modality table, sigmoid"] = _bytes(film)
    found["dicom without preamble"] = found["dicom window, MONOCHROME1"][132:]
    for name, syntax in {
        "implicit": uid.ImplicitVRLittleEndian,
        "big endian": uid.ExplicitVRBigEndian,
        "deflated": uid.DeflatedExplicitVRLittleEndian,
    }.items():
        film = _dicom(gray, 12, 0)
        if syntax == uid.ExplicitVRBigEndian:
            film.PixelData = np.frombuffer(film.PixelData, "<u2").byteswap().tobytes()
        film.file_meta.TransferSyntaxUID = syntax
        found[f"dicom {name}"] = _bytes(film)
    for name, syntax in {
        "rle": uid.RLELossless,
        "jpeg 2000": uid.JPEG2000Lossless,
        "jpeg-ls": uid.JPEGLSLossless,
    }.items():
        film = _dicom(gray, 12, 0)
        try:
            film.compress(syntax)
        except (RuntimeError, NotImplementedError):  # no encoder here
            continue
        found[f"dicom {name}"] = _bytes(film)
    film = _dicom(gray, 8, 0)
    film.file_meta.TransferSyntaxUID = uid.JPEGBaseline8Bit
    film.PixelData = pydicom.encaps.encapsulate([found["jpeg gray"]])
    film["PixelData"].is_undefined_length = True
    found["dicom jpeg"] = _bytes(film)
    return found


def _dicom(gray: np.ndarray, bits: int, signed: int) -> pydicom.Dataset:
    film = pydicom.Dataset()
    film.file_meta = pydicom.dataset.FileMetaDataset()
    film.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    film.file_meta.MediaStorageSOPClassUID = film.SOPClassUID = uid.DigitalXRayImageStorageForPresentation
    film.file_meta.MediaStorageSOPInstanceUID = film.SOPInstanceUID = "1.2.3.4"
    film.Rows, film.Columns = gray.shape
    film.SamplesPerPixel, film.PhotometricInterpretation = 1, "MONOCHROME2"
    film.BitsAllocated, film.BitsStored, film.HighBit = 8 if bits == 8 else 16, bits, bits - 1
    film.PixelRepresentation = signed
    film.PatientID, film.ViewPosition, film.PatientAge = "1", "PA", "050Y"
    stored = gray if bits == 8 else (gray.astype(np.int32) << (bits - 8)) - (2 ** (bits - 1) if signed else 0)
    film.PixelData = stored.astype(np.uint8 if bits == 8 else np.int16 if signed else np.uint16).tobytes()
    return film


def _bytes(film: pydicom.Dataset) -> bytes:
    stream = io.BytesIO()
    film.save_as(stream, enforce_file_format=True)
    return stream.getvalue()


def mutated(kinds: dict[str, bytes], number: int) -> tuple[str, bytes]:
    """The `number`-th damaged file, and which seed it was made of."""
    random = np.random.default_rng(number)
    names = sorted(kinds)
    name = names[number % len(names)]
    data = bytearray(kinds[name])
    for _ in range(random.integers(1, 5)):
        end = min(len(data), 600) if random.random() < 0.5 else len(data)
        at, length = int(random.integers(0, max(end, 1))), int(2 ** random.uniform(0, 7))
        match random.integers(0, 7):
            case 0:
                data[at : at + length] = random.integers(0, 256, length, dtype=np.uint8).tobytes()
            case 1:
                special = [b"\xff\xff\xff\xff", b"\x00\x00\x00\x00", b"\xff\x7f", b"\x00\x80", b"\xff\xff\xff\x7f"]
                chosen = special[random.integers(0, len(special))]
                data[at : at + len(chosen)] = chosen
            case 2:
                del data[at : at + length]
            case 3:
                data[at:at] = data[at : at + length] * int(random.integers(1, 9))
            case 4:
                data[at:at] = random.integers(0, 256, length, dtype=np.uint8).tobytes()
            case 5:
                del data[at:]
            case _:
                other = kinds[names[random.integers(0, len(names))]]
                data[at:] = other[int(random.integers(0, len(other))) :]
    if name.startswith("png") and random.random() < 0.5:
        return name, _with_checksums(bytes(data))
    return name, bytes(data)


def _with_checksums(png: bytes) -> bytes:
    """The same PNG with right checksums, so that it is not refused for these alone."""
    data, at = bytearray(png), 8
    while at + 12 <= len(data) and at + 12 + (length := int.from_bytes(data[at : at + 4], "big")) <= len(data):
        end = at + 8 + length
        data[end : end + 4] = zlib.crc32(data[at + 4 : end]).to_bytes(4, "big")
        at = end + 4
    return bytes(data)


def examine(first: int, last: int) -> tuple[Counter[tuple[str, str]], list[tuple[int, str]]]:
    """Reads files `first` to `last` - 1: how many of each format came to what, and which are worse than refused."""
    kinds, counts, worse = seeds(), Counter[tuple[str, str]](), []
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # a mark that only rises: no file may lift it by 1 GB
    signal.signal(signal.SIGALRM, _too_long)
    warnings.simplefilter("ignore")
    for number in range(first, last):
        name, data = mutated(kinds, number)
        since = time.perf_counter()
        signal.setitimer(signal.ITIMER_REAL, 2 * _SECONDS)
        try:
            read_radiograph(data, max_megapixels=_MEGAPIXELS)
            outcome = "read"
        except RadiographError:
            outcome = "refused"
        except BaseException as error:
            outcome = f"{type(error).__name__}: {error}"[:100]
        signal.setitimer(signal.ITIMER_REAL, 0)
        grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        if time.perf_counter() - since > _SECONDS:
            outcome = f"{time.perf_counter() - since:.1f} s"
        elif grown > _BYTES:
            outcome = f"{grown / 1e6:.0f} MB"
        if outcome not in ("read", "refused"):
            worse.append((number, outcome))
            outcome = "worse"
        counts[name.split()[0], outcome] += 1
    return counts, worse


def _too_long(*_: object) -> None:
    raise TimeoutError("too long")


def main() -> None:
    """Prints the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=24_000)
    parser.add_argument(
        "--keep", type=Path, default=Path("faults"), help="folder for files that are worse than refused"
    )
    arguments = parser.parse_args()
    kinds = seeds()
    print(f"{len(kinds)} seeds: {', '.join(kinds)}")
    counts: Counter[tuple[str, str]] = Counter()
    worse: list[tuple[int, str]] = []
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        starts = range(0, arguments.files, _CHUNK)
        for found, bad in pool.map(examine, starts, [min(s + _CHUNK, arguments.files) for s in starts]):
            counts += found
            worse += bad
    print(f"{'':8}{'files':>8}{'read':>8}{'refused':>9}{'worse':>7}")
    for form in ("dicom", "png", "jpeg"):
        each = [counts[form, outcome] for outcome in ("read", "refused", "worse")]
        print(f"{form:8}{sum(each):8,}{each[0]:8,}{each[1]:9,}{each[2]:7,}")
    for number, outcome in worse:
        arguments.keep.mkdir(parents=True, exist_ok=True)
        (arguments.keep / f"{number}.bin").write_bytes(mutated(kinds, number)[1])
        print(f"{arguments.keep}/{number}.bin ({mutated(kinds, number)[0]}): {outcome}")
    raise SystemExit(1 if worse else 0)


if __name__ == "__main__":
    main()
