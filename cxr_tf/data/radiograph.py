"""One file (DICOM, PNG or JPEG) -> pixels in display polarity; all knowledge of file formats is here.

A DICOM image passes through the steps of the standard's display pipeline (PS3.3 C.11, PS3.4 N.2): the modality LUT
turns stored values into what they measure, the VOI LUT or window picks the range to look at, and MONOCHROME1 is
inverted, so that air is dark and bone is bright in every film. Nothing depends on the brightest pixel of a film that
has a window: two films of one machine stay comparable.

The module needs NumPy, pydicom and Pillow alone, so that an edge device can use it as it is.
"""

from __future__ import annotations

import datetime
import io
import logging
import re
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from os import PathLike, fspath
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pydicom
from PIL import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from pydicom import uid
from pydicom.encaps import get_frame
from pydicom.filereader import read_dataset
from pydicom.pixels import get_decoder

from cxr_tf.errors import CxrError

_MEGA = 1_000_000
_HEADER_BYTES = 64 * 2**20  # room for everything in a file that is not pixels
_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
_PNG_BIT_DEPTH = 24  # its place in the file
_JPEG_MAGIC = b"\xff\xd8\xff"
_JPEG_SYNTAXES = {uid.JPEGBaseline8Bit, uid.JPEGExtended12Bit}
_EXTRA_SYNTAXES = {uid.JPEGLossless, uid.JPEGLosslessSV1, uid.JPEGLSLossless, uid.JPEGLSNearLossless}
_START_OF_FRAME = {0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF, 0xF7}  # F7 is JPEG-LS
_PERCENTILES = (0.5, 99.5)
_SQUARE = 0.02  # by which the sides of a pixel may differ: what measuring them makes
_PHOTOMETRIC = {"", "MONOCHROME1", "MONOCHROME2", "RGB", "PALETTE COLOR", "YBR_FULL", "YBR_FULL_422"}  # that it may say
_LATERAL = {"LL", "RL", "LATERAL", "LAT"}
_VIEWS = {"PA", "AP", "RLD", "LLD", "RLO", "LLO"}  # DICOM's other terms; whatever else was typed may be anything
_OLDEST = 130  # years; what is beyond is a typing error or a placeholder
_YEARS = {"D": 1 / 365.25, "W": 7 / 365.25, "M": 1 / 12, "Y": 1.0}


class RadiographError(CxrError):
    """A file that is no readable radiograph: which file, what is wrong with it, and what would be accepted."""


class RadiographWarning(UserWarning):
    """A file that can be read, but whose pixels may not be what its author meant."""


@dataclass(frozen=True)
class Header:
    """What a file says about its film, without its pixels.

    Attributes:
        format: "dicom", "png" or "jpeg".
        height: rows.
        width: columns.
        transfer_syntax: DICOM's UID of the encoding, for example "1.2.840.10008.1.2.1".
        photometric: "MONOCHROME1" or "MONOCHROME2", as the file has it.
        patient_id: for grouping films by patient; like the two UIDs it belongs into the manifest and nowhere else, and
            is left out of `repr`.
        study_uid: StudyInstanceUID.
        sop_uid: SOPInstanceUID.
        view: "PA", "AP", "LATERAL", or one of DICOM's terms for decubitus and oblique films.
        sex: "M" or "F".
        age: years, from PatientAge or from the birth date and the study's date.
        pixel_spacing: millimeters between rows and between columns.

    All but the first three are None where a file does not say, as PNG and JPEG files never do.
    """

    format: str
    height: int
    width: int
    transfer_syntax: str | None = None
    photometric: str | None = None
    patient_id: str | None = field(default=None, repr=False)
    study_uid: str | None = field(default=None, repr=False)
    sop_uid: str | None = field(default=None, repr=False)
    view: str | None = None
    sex: str | None = None
    age: float | None = None
    pixel_spacing: tuple[float, float] | None = None


def read_radiograph(source: str | PathLike[str] | bytes, *, max_megapixels: float = 100.0) -> np.ndarray:
    """Reads one film at full resolution in display polarity: air dark, bone bright.

    The format is told by the file's first bytes, never by its ending.

    - DICOM: modality LUT (sequence or rescale), then VOI LUT sequence or first window (LINEAR, LINEAR_EXACT, SIGMOID),
      whose own range becomes 0-255; without either the modality values between their 0.5 and 99.5 percentiles. Then
      8-bit rounding, then MONOCHROME1 is inverted. Padding (PixelPaddingValue, PixelPaddingRangeLimit) counts in no
      percentile and is black. One frame, one sample a pixel, 8 to 16 bits stored, signed or not.
    - PNG: color becomes luminance (ITU-R 601), transparency is dropped, 16 bits are read by their high byte.
    - JPEG: the luminance channel. These two equal `tf.io.decode_png` and `tf.io.decode_jpeg(dct_method=
      "INTEGER_ACCURATE")` with `channels=1`, within one gray level.

    Args:
        source: path of a file, or the bytes of one.
        max_megapixels: bound on the number of pixels, checked before any is decoded, in millions.

    Returns:
        uint8 `[height, width]`, 0-255.

    Raises:
        RadiographError: the file is missing, empty, truncated, no radiograph, of a kind that is refused (multi-frame,
            color DICOM, CMYK), larger than the bound, or compressed in a way that no installed decoder reads.

    Warns:
        RadiographWarning: a 16-bit PNG whose high byte is nearly empty; a DICOM window that cannot be used; pixels that
            are not square.

    Example:
        >>> pixels = read_radiograph("study.dcm")
        >>> pixels.dtype, pixels.ndim
        (dtype('uint8'), 2)
    """
    notes: list[str] = []
    with _reading(source, max_megapixels) as (stream, kind, max_pixels):
        pixels = {"dicom": _dicom_pixels, "png": _png_pixels, "jpeg": _jpeg_pixels}[kind](stream, max_pixels, notes)
    for note in notes:
        warnings.warn(f"{_name(source)} {note}", RadiographWarning, stacklevel=2)
    return pixels


def read_header(source: str | PathLike[str] | bytes, *, max_megapixels: float = 100.0) -> Header:
    """Reads what a file says about its film and decodes no pixel.

    Args:
        source: path of a file, or the bytes of one.
        max_megapixels: as for `read_radiograph`; a film beyond it is refused here too.

    Returns:
        The `Header`. It holds no name and no birth date.

    Raises:
        RadiographError: as for `read_radiograph`, where the header alone tells.

    Example:
        >>> header = read_header("study.dcm")
        >>> header.format, header.view
        ('dicom', 'PA')
    """
    with _reading(source, max_megapixels) as (stream, kind, max_pixels):
        if kind == "dicom":
            return _dicom_header(stream, max_pixels)
        image = (PngImageFile if kind == "png" else JpegImageFile)(stream)
        _check_size(image.height, image.width, max_pixels)
        return Header(kind, image.height, image.width)


# --- one place that opens, tells formats apart, and turns every exception into ours ---------------------------------


def _name(source: str | PathLike[str] | bytes) -> str:
    return "<bytes>" if isinstance(source, bytes | bytearray | memoryview) else fspath(source)


@contextmanager
def _reading(source: str | PathLike[str] | bytes, max_megapixels: float) -> Iterator[tuple[BinaryIO, str, int]]:
    """Opens a source, tells its format, and names the file in every error that reading it raises."""
    name = _name(source)
    max_pixels = int(max_megapixels * _MEGA)
    try:
        with _quiet, _opened(source) as stream:
            size = stream.seek(0, io.SEEK_END)
            stream.seek(0)
            if size == 0:
                raise RadiographError("is empty")
            # Uncompressed 16-bit color needs 6 bytes a pixel: whatever is larger than this holds no film in the bound.
            if size > 8 * max_pixels + _HEADER_BYTES:
                raise RadiographError(
                    f"is larger than any film of {max_megapixels:g} megapixels (max_megapixels). "
                    f"Received: {size / _MEGA:.0f} MB"
                )
            yield stream, _format(stream), max_pixels
    except RadiographError as error:
        raise RadiographError(f"{name} {error}") from error.__cause__
    except OSError as error:
        if error.errno is None:
            raise RadiographError(f"{name} is damaged or truncated: {_one_line(error)}") from error
        raise RadiographError(f"{name} cannot be opened: {error.strerror}") from error
    except MemoryError as error:
        raise RadiographError(f"{name} needs more memory than there is; lower max_megapixels to refuse it") from error
    except Exception as error:  # decoders raise whatever they like on damaged bytes
        raise RadiographError(f"{name} is damaged or truncated: {_one_line(error)}") from error


def _opened(source: str | PathLike[str] | bytes) -> BinaryIO:
    if isinstance(source, bytes | bytearray | memoryview):
        return io.BytesIO(source)
    path = Path(source)
    if path.is_dir():
        raise RadiographError("is a folder; a DICOM, PNG or JPEG file is expected")
    return path.open("rb")


def _format(stream: BinaryIO) -> str:
    head = stream.read(132)
    stream.seek(0)
    if head[128:] == b"DICM":
        return "dicom"
    if head.startswith(_PNG_MAGIC):
        return "png"
    if head.startswith(_JPEG_MAGIC):
        return "jpeg"
    # DICOM without its preamble starts with a tag of group 0002 or 0008; _dicom_image looks for the rest.
    if head[:2] in (b"\x02\x00", b"\x08\x00", b"\x00\x08"):
        return "dicom"
    raise RadiographError("is no DICOM, PNG or JPEG file")


def _one_line(error: Exception) -> str:
    text = re.sub(r"[^\x20-\x7e]+", " ", str(error)).strip()
    text = re.sub(r"""b?['"].*['"]""", "...", text)  # bytes that a library choked on: a name, when lengths are wrong
    return (text[:200] + "...") if len(text) > 200 else (text or type(error).__name__)


def _check_size(height: int, width: int, max_pixels: int) -> None:
    if height < 1 or width < 1:
        raise RadiographError(f"has no pixels. Received: {height} rows, {width} columns")
    if height * width > max_pixels:
        raise RadiographError(
            f"is larger than {max_pixels / _MEGA:g} megapixels, the bound that keeps a small file from taking all "
            f"memory; raise max_megapixels for a file you trust. Received: {height} x {width} pixels"
        )


class _Quiet:
    """Silences pydicom's warnings and log, and holds Pillow to refusing truncated files, while any thread reads.

    These are settings of the process. Readers are counted, and only the first and the last change them, because readers
    in several threads would otherwise restore each other's.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.readers = 0

    def __enter__(self) -> None:
        with self.lock:
            self.readers += 1
            if self.readers > 1:
                return
            self.caught = warnings.catch_warnings()
            self.caught.__enter__()
            warnings.simplefilter("ignore")
            self.logger = logging.getLogger("pydicom")
            self.level = self.logger.level
            self.logger.setLevel(logging.CRITICAL + 1)
            self.rescue = ImageFile.LOAD_TRUNCATED_IMAGES
            ImageFile.LOAD_TRUNCATED_IMAGES = False

    def __exit__(self, *exception: object) -> None:
        with self.lock:
            self.readers -= 1
            if self.readers:
                return
            ImageFile.LOAD_TRUNCATED_IMAGES = self.rescue
            self.logger.setLevel(self.level)
            self.caught.__exit__(None, None, None)


_quiet = _Quiet()


# --- PNG and JPEG ---------------------------------------------------------------------------------------------------


def _png_pixels(stream: BinaryIO, max_pixels: int, notes: list[str]) -> np.ndarray:
    # The plugin itself, not Image.open: its bound of pixels is the process's and not ours to set.
    data = stream.read()
    image = PngImageFile(io.BytesIO(data))
    _check_size(image.height, image.width, max_pixels)
    _check_png(data)
    if image.mode.startswith("I"):  # 16-bit gray
        pixels = (np.asarray(image).astype(np.uint16, copy=False) >> 8).astype(np.uint8)
    else:
        pixels = np.array(image if image.mode == "L" else image.convert("L"), np.uint8)
    if data[_PNG_BIT_DEPTH] == 16 and pixels.max() < 64:
        notes.append(
            "is a 16-bit PNG that uses less than a quarter of its range (perhaps 8- or 12-bit values were stored "
            f"unscaled): it reads as nearly black; scale it to the full range. Received: highest value {pixels.max()} "
            "of 255"
        )
    return pixels


def _check_png(data: bytes) -> None:
    """Walks all chunks (lengths, checksums, end): Pillow looks at no checksum of pixels and misses a lost end."""
    view, at = memoryview(data), len(_PNG_MAGIC)
    while at + 12 <= len(data):
        end = at + 8 + struct.unpack_from(">I", data, at)[0]
        if end + 4 > len(data):
            break
        if zlib.crc32(view[at + 4 : end]) != struct.unpack_from(">I", data, end)[0]:
            raise RadiographError("is a damaged PNG: a checksum does not fit")
        if view[at + 4 : at + 8] == b"IEND":
            return
        at = end + 4
    raise RadiographError("is a truncated PNG: it ends before its last chunk")


def _jpeg_pixels(stream: BinaryIO, max_pixels: int, notes: list[str]) -> np.ndarray:
    data = stream.read()
    image = JpegImageFile(io.BytesIO(data))
    _check_size(image.height, image.width, max_pixels)
    if image.mode not in ("L", "RGB"):
        raise RadiographError(f"is a JPEG of an unfit color space; gray or RGB is expected. Received: {image.mode}")
    if data.rfind(b"\xff\xd9") < data.rfind(b"\xff\xda"):
        raise RadiographError("is a truncated JPEG: its end marker is missing")
    if image.mode == "RGB":
        image.draft("L", image.size)  # the file's own Y channel, as TensorFlow takes it, not a gray made from RGB
    return np.array(image.convert("L"), np.uint8)


# --- DICOM ----------------------------------------------------------------------------------------------------------


def _parse(stream: BinaryIO, max_pixels: int, header_only: bool) -> tuple[pydicom.Dataset, uid.UID]:
    """The data set and its transfer syntax; a deflated one is inflated within the bound (pydicom has none)."""
    prefixed = stream.read(132)[128:] == b"DICM"
    stream.seek(132 if prefixed else 0)
    meta = read_dataset(stream, False, True, stop_when=lambda tag, vr, length: tag >> 16 != 2)
    if meta.get("TransferSyntaxUID") != uid.DeflatedExplicitVRLittleEndian:
        stream.seek(0)
        dataset = pydicom.dcmread(stream, force=True, stop_before_pixels=header_only)
        syntax = dataset.file_meta.get("TransferSyntaxUID")
        if not syntax:
            implicit, little = dataset.original_encoding
            plain = uid.ExplicitVRLittleEndian if little else uid.ExplicitVRBigEndian
            syntax = uid.ImplicitVRLittleEndian if implicit else plain
        if not uid.UID(syntax).is_valid:
            raise RadiographError("has a TransferSyntaxUID that is no UID")
        return dataset, uid.UID(syntax)
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    inflated = inflater.decompress(stream.read(), 2 * max_pixels + _HEADER_BYTES)
    if inflater.unconsumed_tail:
        raise RadiographError(
            f"is a deflated DICOM file that inflates to more than a film of {max_pixels / _MEGA:g} megapixels "
            f"(max_megapixels) needs. Received: more than {len(inflated) / _MEGA:.0f} MB"
        )
    if not inflater.eof:
        raise RadiographError("is a truncated DICOM file: its deflated data ends too early")
    stop = (lambda tag, vr, length: tag == 0x7FE00010) if header_only else None
    return read_dataset(io.BytesIO(inflated), False, True, stop_when=stop), uid.DeflatedExplicitVRLittleEndian


def _number(dataset: pydicom.Dataset, keyword: str) -> float | None:
    """The first value of an element; None where it is absent or empty."""
    value = dataset.get(keyword)
    if isinstance(value, pydicom.multival.MultiValue):
        value = value[0] if value else None
    if value is None or value == "":
        return None
    number = float(value)
    if not np.isfinite(number):
        raise RadiographError(f"has a {keyword} that is no number. Received: {value}")
    return number


def _dicom_image(dataset: pydicom.Dataset, max_pixels: int) -> tuple[int, int, str]:
    """Rows, columns and photometric interpretation, after everything that can be refused without the pixels."""
    if not (dataset.get("Rows") and dataset.get("Columns")):
        raise RadiographError("holds no image: Rows or Columns is missing (a report, or a truncated file)")
    height, width = int(dataset.Rows), int(dataset.Columns)
    frames = int(_number(dataset, "NumberOfFrames") or 1)
    _check_size(height, width, max_pixels)
    if frames > 1:
        raise RadiographError(f"is a multi-frame image; one frame is expected. Received: NumberOfFrames {frames}")
    photometric = str(dataset.get("PhotometricInterpretation", "")).strip()
    samples = int(_number(dataset, "SamplesPerPixel") or 1)
    if photometric not in ("MONOCHROME1", "MONOCHROME2") or samples != 1:
        raise RadiographError(
            "is no gray image; PhotometricInterpretation MONOCHROME1 or MONOCHROME2 with one sample a pixel is "
            f"expected. Received: {repr(photometric) if photometric in _PHOTOMETRIC else 'another term'}, "
            f"SamplesPerPixel {samples}"
        )
    return height, width, photometric


def _dicom_header(stream: BinaryIO, max_pixels: int) -> Header:
    dataset, syntax = _parse(stream, max_pixels, header_only=True)
    height, width, photometric = _dicom_image(dataset, max_pixels)

    def text(keyword: str) -> str | None:
        return _optional(dataset, keyword)

    view = (text("ViewPosition") or "").upper()
    sex = (text("PatientSex") or "").upper()
    return Header(
        format="dicom",
        height=height,
        width=width,
        transfer_syntax=str(syntax),
        photometric=photometric,
        patient_id=text("PatientID"),
        study_uid=text("StudyInstanceUID"),
        sop_uid=text("SOPInstanceUID"),
        view="LATERAL" if view in _LATERAL else view if view in _VIEWS else None,
        sex=sex if sex in ("M", "F") else None,
        age=_age(text("PatientAge"), text("PatientBirthDate"), text("StudyDate")),
        pixel_spacing=_spacing(text("PixelSpacing")) or _spacing(text("ImagerPixelSpacing")),
    )


def _optional(dataset: pydicom.Dataset, keyword: str) -> str | None:
    """An element as text; a malformed one is one that says nothing."""
    try:
        value = dataset.get(keyword)
    except Exception:
        return None
    return str(value).strip() or None if value is not None else None


def _aspect(dataset: pydicom.Dataset) -> float:
    """Height of a pixel by its width; 1 where a file does not say."""
    for keyword in ("PixelSpacing", "ImagerPixelSpacing", "PixelAspectRatio"):
        if spacing := _spacing(_optional(dataset, keyword)):
            return spacing[0] / spacing[1]
    return 1.0


def _age(age: str | None, birth: str | None, study: str | None) -> float | None:
    """Years, from "045Y", "006M", "012W", "030D" (plain digits are years) or else from the two dates."""
    if match := re.fullmatch(r"(\d{1,4})([DWMY]?)", (age or "").upper()):
        years = int(match[1]) * _YEARS[match[2] or "Y"]
        return years if years < _OLDEST else None
    try:
        born, taken = _date(birth or ""), _date(study or "")
    except ValueError:
        return None
    # Whole years: with the study's date, days would give the birth date back.
    years = taken.year - born.year - ((taken.month, taken.day) < (born.month, born.day))
    return float(years) if 0 <= years < _OLDEST else None


def _date(text: str) -> datetime.date:
    return datetime.datetime.strptime(text.replace(".", ""), "%Y%m%d").date()


def _spacing(text: str | None) -> tuple[float, float] | None:
    numbers = [float(number) for number in re.findall(r"\d+\.?\d*(?:[eE][+-]?\d+)?", text or "")]
    return (numbers[0], numbers[1]) if len(numbers) == 2 and min(numbers) > 0 else None


def _dicom_pixels(stream: BinaryIO, max_pixels: int, notes: list[str]) -> np.ndarray:
    dataset, syntax = _parse(stream, max_pixels, header_only=False)
    _, _, photometric = _dicom_image(dataset, max_pixels)
    stored = _stored_values(dataset, syntax)
    # All that follows depends on a pixel's value alone, so it is worked out once for each value that can occur (256 or
    # 65,536), in double precision, and looked up.
    codes = stored.view(f"u{stored.itemsize}")
    levels = np.arange(2 ** (8 * stored.itemsize), dtype=codes.dtype).view(stored.dtype)
    padding = _padding(dataset, levels)
    modality = _modality(dataset, levels)
    table = _voi(dataset, modality, notes)
    if abs((aspect := _aspect(dataset)) - 1) > _SQUARE:
        notes.append(
            f"has pixels that are not square ({aspect:.2f} times as high as wide); they are kept, so that masks and "
            "boxes fit, and the film looks stretched"
        )
    if table is None:
        counts = np.zeros(len(levels), np.int64)
        for row in codes:
            counts += np.bincount(row, minlength=len(levels))
        counts[padding] = 0
        table = _percentile_range(modality, counts)
    table = np.rint(255 * np.clip(table, 0, 1)).astype(np.uint8)
    if photometric == "MONOCHROME1":
        table = 255 - table
    table[padding] = 0
    pixels = np.empty(codes.shape, np.uint8)
    for source, target in zip(codes, pixels, strict=True):  # by rows: the lookup widens its indices to 8 bytes
        np.take(table, source, out=target)
    return pixels


def _stored_values(dataset: pydicom.Dataset, syntax: uid.UID) -> np.ndarray:
    """Decoded stored values `[rows, columns]`, 8 or 16 bits, signed or not, in the machine's byte order."""
    if "PixelData" not in dataset:
        raise RadiographError("is a DICOM file without pixel data, or one that ends before it (truncated)")
    for keyword in ("BitsAllocated", "BitsStored", "PixelRepresentation"):
        if dataset.get(keyword) is None:
            raise RadiographError(f"is a DICOM image without {keyword}")
    allocated, bits = int(dataset.BitsAllocated), int(dataset.BitsStored)
    if allocated not in (8, 16) or not 8 <= bits <= allocated:
        raise RadiographError(
            "stores its pixels in a way that is no radiograph's; 8 to 16 bits stored in 8 or 16 are expected. "
            f"Received: BitsStored {bits}, BitsAllocated {allocated}"
        )
    high = int(dataset.get("HighBit", bits - 1))
    if high != bits - 1:
        raise RadiographError(
            f"places its pixels' bits in a retired way; HighBit {bits - 1} is expected with BitsStored {bits}. "
            f"Received: HighBit {high}"
        )
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:
        raise RadiographError(_undecodable(syntax)) from None
    if not decoder.is_available:
        raise RadiographError(_undecodable(syntax))
    options: dict[str, Any] = {}
    if syntax.is_encapsulated:
        _check_codestream(dataset, syntax)
        # One fixed choice where several are installed, so that films read alike everywhere. On damaged data pylibjpeg's
        # run-length decoder panics with what is no Exception, and pyjpegls may take seconds: others stand before them.
        order = ["pydicom", "pylibjpeg", "pillow", "gdcm", "pyjpegls"]
        if syntax in _JPEG_SYNTAXES:
            order.insert(0, "pillow")
        options["decoding_plugin"] = next(name for name in order if name in decoder.available_plugins)
    try:
        stored, _ = decoder.as_array(dataset, index=0, raw=True, allow_excess_frames=False, **options)
    except Exception as error:
        if syntax == uid.JPEGExtended12Bit and bits > 8:
            raise RadiographError(_undecodable(syntax)) from error
        raise
    return np.ascontiguousarray(stored.astype(stored.dtype.newbyteorder("="), copy=False))


def _undecodable(syntax: uid.UID) -> str:
    text = f'is compressed as "{syntax.name}" ({syntax}), which no installed decoder reads'
    if syntax in _EXTRA_SYNTAXES:
        return f'{text}; its decoder comes with: pip install "cxr-tf[dicom]"'
    return (
        f'{text}, nor one that pip install "cxr-tf[dicom]" brings; write it uncompressed first, '
        "for example with: gdcmconv --raw IN OUT, or: dcmdjpeg IN OUT"
    )


def _check_codestream(dataset: pydicom.Dataset, syntax: uid.UID) -> None:
    """Refuses a compressed image whose own size is not the header's: decoders trust the former and take its memory."""
    data = get_frame(dataset.PixelData, 0, number_of_frames=1)
    found = None
    if syntax in uid.JPEG2000TransferSyntaxes:
        start = data.find(b"\xff\x4f\xff\x51")  # SOC and SIZ; in front of them may stand JP2's boxes
        if start >= 0:
            right, bottom, left, top = struct.unpack_from(">4I", data, start + 8)
            found = (bottom - top, right - left)
    elif syntax in uid.JPEGTransferSyntaxes or syntax in uid.JPEGLSTransferSyntaxes:
        at = 2
        while at + 9 <= len(data) and data[at] == 0xFF and data[at + 1] != 0xDA:
            if data[at + 1] == 0xFF:  # fill byte
                at += 1
            elif data[at + 1] in _START_OF_FRAME:
                found = struct.unpack_from(">2H", data, at + 5)
                break
            else:
                at += 2 + struct.unpack_from(">H", data, at + 2)[0]
    else:
        return  # run lengths hold no size and grow a file by 64 at most
    expected = (int(dataset.Rows), int(dataset.Columns))
    if found != expected:
        raise RadiographError(
            f"is damaged: its compressed image must have the header's size of {expected[0]} x {expected[1]} pixels. "
            f"Received: {'no size' if found is None else f'{found[0]} x {found[1]}'}"
        )


def _padding(dataset: pydicom.Dataset, levels: np.ndarray) -> np.ndarray:
    """Which stored values are padding (PS3.3 C.7.5.1.1.2): bool, one for each of `levels`."""
    first = _number(dataset, "PixelPaddingValue")
    if first is None:
        return np.zeros(len(levels), bool)
    limit = _number(dataset, "PixelPaddingRangeLimit")
    # Files often write them unsigned over signed pixels; the bits are what counts.
    last = first if limit is None else limit
    edges = [int(np.array(int(edge) % 2**32, np.uint32).astype(levels.dtype)) for edge in (first, last)]
    return (levels >= min(edges)) & (levels <= max(edges))


def _lookup(dataset: pydicom.Dataset, item: pydicom.Dataset, values: np.ndarray) -> tuple[np.ndarray, int]:
    """A DICOM LUT applied to `values`, and the bits of its output.

    pydicom's own fails where values minus the first mapped one leave the pixels' type, and on depths such as 12.
    """
    entries, first, bits = (int(number) for number in item.LUTDescriptor)
    entries = entries or 65536
    data = item.LUTData
    if isinstance(data, bytes):
        little = getattr(dataset, "original_encoding", (None, True))[1] is not False
        packed = np.frombuffer(data[: len(data) // 2 * 2], "<u2" if little else ">u2")
    else:
        packed = np.atleast_1d(np.asarray(data, np.int64)).astype(np.uint16)
    if len(packed) < entries and entries <= 2 * len(packed):  # 8-bit entries, two in a word
        packed = packed.astype("<u2").view(np.uint8)
    if len(packed) < entries or not 8 <= bits <= 16:
        raise RadiographError(
            "has a lookup table that does not fit its descriptor; 8 to 16 bits an entry are expected. "
            f"Received: {len(packed)} of {entries} entries, {bits} bits"
        )
    table = packed[:entries].astype(np.float64)
    index = np.clip(np.rint(values) - first, 0, entries - 1).astype(np.int64)
    # Some tables use more bits than they claim; their own range is the lesser evil to white-out.
    return table[index], max(bits, int(table.max()).bit_length())


def _modality(dataset: pydicom.Dataset, levels: np.ndarray) -> np.ndarray:
    """Modality LUT sequence, or rescale, or nothing (PS3.3 C.11.1): float64, one for each of `levels`."""
    if sequence := dataset.get("ModalityLUTSequence"):
        return _lookup(dataset, sequence[0], levels.astype(np.float64))[0]
    slope, intercept = _number(dataset, "RescaleSlope"), _number(dataset, "RescaleIntercept")
    if slope == 0:
        raise RadiographError("has a RescaleSlope that makes all pixels alike. Received: 0")
    return levels.astype(np.float64) * (1 if slope is None else slope) + (intercept or 0)


def _voi(dataset: pydicom.Dataset, values: np.ndarray, notes: list[str]) -> np.ndarray | None:
    """VOI LUT sequence or first window (PS3.3 C.11.2) onto 0-1; None without either."""
    if sequence := dataset.get("VOILUTSequence"):
        looked_up, bits = _lookup(dataset, sequence[0], values)
        return looked_up / (2**bits - 1)
    center, width = _number(dataset, "WindowCenter"), _number(dataset, "WindowWidth")
    if center is None or width is None:
        return None
    function = str(dataset.get("VOILUTFunction") or "LINEAR").strip().upper()
    if function not in ("LINEAR", "LINEAR_EXACT", "SIGMOID"):
        raise RadiographError("has an unknown VOILUTFunction; LINEAR, LINEAR_EXACT or SIGMOID is expected")
    if width <= 0 or (function == "LINEAR" and width < 1):
        notes.append(f"has a window that selects nothing and is left out. Received: WindowWidth {width:g}")
        return None
    if function == "SIGMOID":
        return 1 / (1 + np.exp(np.clip(-4 * (values - center) / width, -700, 700)))
    if function == "LINEAR":
        center, width = center - 0.5, width - 1
    if width == 0:
        return (values > center).astype(np.float64)
    return (values - center) / width + 0.5


def _percentile_range(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The range between two percentiles of a film's values, given how often each occurs, onto 0-1."""
    total = int(counts.sum())
    if total == 0:
        raise RadiographError("holds nothing but padding")
    order = np.argsort(values, kind="stable")
    ranks = np.cumsum(counts[order])

    def percentile(q: float) -> float:  # np.percentile's linear interpolation, without the sorted film
        position = q / 100 * (total - 1)
        below, above = values[order][np.searchsorted(ranks, [np.floor(position), np.ceil(position)], side="right")]
        return float(below + (above - below) * (position - np.floor(position)))

    low, high = (percentile(q) for q in _PERCENTILES)
    return (values - low) / (high - low) if high > low else np.zeros_like(values)
