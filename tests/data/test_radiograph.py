"""Reading films: the standard's formulas, TensorFlow's decoders, and everything that must be refused."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import threading
import warnings
import zlib
from pathlib import Path

import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile
from pydicom import uid
from pydicom.encaps import encapsulate
from pydicom.pixels import get_decoder

from cxr_tf.data.radiograph import Header, RadiographError, RadiographWarning, read_header, read_radiograph

RAMP = np.arange(4096, dtype=np.uint16).reshape(64, 64)


def dicom(pixels: np.ndarray | bytes = RAMP, syntax: str = uid.ExplicitVRLittleEndian, **elements: object) -> bytes:
    """A small DICOM file; an element given as None is left out."""
    array = pixels if isinstance(pixels, np.ndarray) else None
    dataset = pydicom.Dataset()
    dataset.SOPClassUID = uid.ComputedRadiographyImageStorage
    dataset.SOPInstanceUID = "1.2.3"
    dataset.PatientName = "Secret^Person"
    dataset.PatientID = "p1"
    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.PixelRepresentation = int(array is not None and array.dtype.kind == "i")
    if array is not None:
        dataset.Rows, dataset.Columns = array.shape[:2]
        bits = 8 * array.dtype.itemsize
        dataset.BitsAllocated = bits
        dataset.BitsStored = elements.pop("BitsStored", 12 if bits == 16 else 8)
        dataset.HighBit = dataset.BitsStored - 1
        order = ">" if syntax == uid.ExplicitVRBigEndian else "<"
        dataset.PixelData = array.astype(array.dtype.newbyteorder(order)).tobytes()
    else:
        dataset.PixelData = pixels
    for keyword, value in elements.items():
        if value is None:
            del dataset[keyword]
        else:
            setattr(dataset, keyword, value)
    if "PixelData" in dataset:
        dataset["PixelData"].VR = "OB" if dataset.get("BitsAllocated") == 8 or uid.UID(syntax).is_encapsulated else "OW"
        dataset["PixelData"].is_undefined_length = uid.UID(syntax).is_encapsulated
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    dataset.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    out = io.BytesIO()
    dataset.save_as(out, enforce_file_format=True)
    return out.getvalue()


def lut(first: int, values: list[int], bits: int) -> pydicom.Sequence:
    item = pydicom.Dataset()
    item.add_new("LUTDescriptor", "SS" if first < 0 else "US", [len(values) % 65536, first, bits])
    item.add_new("LUTData", "US", values)
    return pydicom.Sequence([item])


def image(array: np.ndarray, kind: str = "PNG", mode: str | None = None, **options: object) -> bytes:
    out = io.BytesIO()
    (Image.fromarray(array) if mode is None else Image.fromarray(array).convert(mode)).save(out, kind, **options)
    return out.getvalue()


def film(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Smooth 8-bit content, so that JPEG does what it does on radiographs."""
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(0, 255, (6, 7, *shape[2:])).astype(np.float32)
    planes = coarse[..., None] if coarse.ndim == 2 else coarse
    grown = [
        np.asarray(Image.fromarray(planes[..., i]).resize((shape[1], shape[0]), Image.Resampling.BICUBIC))
        for i in range(planes.shape[-1])
    ]
    return np.clip(np.stack(grown, -1).reshape(shape), 0, 255).astype(np.uint8)


def as_uint8(unit: np.ndarray) -> np.ndarray:
    return np.rint(255 * np.clip(unit, 0, 1)).astype(np.uint8)


# --- the real files -------------------------------------------------------------------------------------------------


def test_real_negative(cxr_data):
    folder = cxr_data / "dicom"
    positive = read_radiograph(folder / "nih_siimacr_pa_jpegbaseline_mono2.dcm")
    negative = read_radiograph(folder / "nih_siimacr_pa_jpegbaseline_fakemono1.dcm")
    np.testing.assert_array_equal(negative, 255 - positive)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("nema_wg04_rg1_cr_pa_jpeg2000_mono1", ((1955, 1841), uid.JPEG2000, "PA", "F", None)),
        ("nih_google_dx_implicitle_mono2", ((1024, 1024), uid.ImplicitVRLittleEndian, None, "M", 81.0)),
        ("nih_rsna_ap_jpegbaseline_mono2", ((1024, 1024), uid.JPEGBaseline8Bit, "AP", "F", 68.0)),
        ("nih_siimacr_pa_jpegbaseline_mono2", ((1024, 1024), uid.JPEGBaseline8Bit, "PA", "M", 62.0)),
    ],
)
def test_real_files_show_a_chest(cxr_data, name, expected):
    path = cxr_data / "dicom" / f"{name}.dcm"
    shape, syntax, view, sex, age = expected
    pixels, header = read_radiograph(path), read_header(path)
    assert pixels.dtype == np.uint8
    assert pixels.shape == (header.height, header.width) == shape
    assert (header.transfer_syntax, header.view, header.sex) == (syntax, view, sex)
    assert age is None or header.age == age
    height, width = shape
    middle = slice(int(0.3 * height), int(0.5 * height))
    lungs = np.minimum(pixels[middle, int(0.2 * width) : int(0.35 * width)].mean(),
                       pixels[middle, int(0.62 * width) : int(0.75 * width)].mean())  # fmt: skip
    spine = pixels[middle, int(0.47 * width) : int(0.53 * width)].mean()
    assert spine > lungs + 30  # bone bright, air dark


def test_real_window_is_the_files_own(cxr_data):
    path = cxr_data / "dicom" / "nema_wg04_rg1_cr_pa_jpeg2000_mono1.dcm"
    stored = pydicom.dcmread(path).pixel_array.astype(np.float64)  # window 15000 +- 15000, MONOCHROME1
    expected = 255 - as_uint8((stored - 14999.5) / 29999 + 0.5)
    np.testing.assert_array_equal(read_radiograph(path), expected)


# --- modality, VOI, polarity ----------------------------------------------------------------------------------------


def standard_linear(x: np.ndarray, center: float, width: float) -> np.ndarray:
    """PS3.3 C.11.2.1.2.1, literally, onto 0-1."""
    below, above = x <= center - 0.5 - (width - 1) / 2, x > center - 0.5 + (width - 1) / 2
    inside = (x - (center - 0.5)) / max(width - 1, 1e-30) + 0.5
    return np.where(below, 0.0, np.where(above, 1.0, inside))


@pytest.mark.parametrize(
    ("center", "width"), [(2048, 4096), (1000.5, 301), (100, 1), (3000, 2), (-50, 400), (9000, 20)]
)
def test_linear(center, width):
    expected = as_uint8(standard_linear(RAMP.astype(float), center, width))
    np.testing.assert_array_equal(read_radiograph(dicom(WindowCenter=center, WindowWidth=width)), expected)


def test_linear_exact_and_sigmoid():
    x = RAMP.astype(float)
    tags = {"WindowCenter": 2000, "WindowWidth": 1500}
    exact = read_radiograph(dicom(VOILUTFunction="LINEAR_EXACT", **tags))
    np.testing.assert_array_equal(exact, as_uint8((x - 2000) / 1500 + 0.5))
    sigmoid = read_radiograph(dicom(VOILUTFunction="SIGMOID", **tags))
    np.testing.assert_array_equal(sigmoid, as_uint8(1 / (1 + np.exp(-4 * (x - 2000) / 1500))))


def test_windows_agree_with_pydicom():
    data = dicom(WindowCenter=[1500, 900], WindowWidth=[1800, 10], RescaleSlope="0.5", RescaleIntercept="100")
    dataset = pydicom.dcmread(io.BytesIO(data))
    values = pydicom.pixels.apply_modality_lut(RAMP, dataset)
    theirs = pydicom.pixels.apply_windowing(values, dataset)  # of the modality range, 100 to 2147.5
    np.testing.assert_array_equal(read_radiograph(data), as_uint8((theirs - 100) / 2047.5))


def test_window_ignores_the_brightest_pixel():
    dark = (RAMP // 8).astype(np.uint16)
    bright = dark.copy()
    bright[-1, -1] = 4095
    tags = {"WindowCenter": 2048, "WindowWidth": 4096}
    first, second = (read_radiograph(dicom(pixels, **tags)) for pixels in (dark, bright))
    np.testing.assert_array_equal(first.ravel()[:-1], second.ravel()[:-1])
    assert first.max() == 32


@pytest.mark.parametrize("slope", [1, 0.25, -2])
def test_rescale_then_percentiles(slope):
    pixels = np.random.default_rng(0).integers(0, 4096, (50, 61)).astype(np.uint16)
    values = pixels * float(slope) - 1024
    low, high = np.percentile(values, (0.5, 99.5))
    data = dicom(pixels, RescaleSlope=slope, RescaleIntercept=-1024)
    np.testing.assert_array_equal(read_radiograph(data), as_uint8((values - low) / (high - low)))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 400), st.sampled_from(["u1", "i1", "u2", "i2"]))
def test_percentiles_are_numpys(seed, count, dtype):
    rng = np.random.default_rng(seed)
    info = np.iinfo(dtype)
    pixels = rng.integers(info.min // rng.integers(1, 9), info.max // rng.integers(1, 9) + 1, (1, count)).astype(dtype)
    low, high = np.percentile(pixels, (0.5, 99.5))
    expected = as_uint8((pixels - low) / (high - low)) if high > low else np.zeros(pixels.shape, np.uint8)
    got = read_radiograph(dicom(pixels, BitsStored=8 * pixels.itemsize))
    assert np.abs(got.astype(int) - expected).max() <= 1
    assert (got != expected).mean() < 0.05  # a last bit of the interpolation


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.booleans(), st.booleans(), st.sampled_from([8, 10, 12, 16]))
def test_the_photometric_tag_alone_gives_the_exact_negative(seed, window, signed, bits):
    rng = np.random.default_rng(seed)
    low = -(2 ** (bits - 1)) if signed else 0
    pixels = rng.integers(low, low + 2**bits, (9, 11)).astype("i2" if signed else "u2")
    tags = {"WindowCenter": low + 2 ** (bits - 1), "WindowWidth": int(rng.integers(1, 2**bits))} if window else {}
    positive = read_radiograph(dicom(pixels, BitsStored=bits, **tags))
    negative = read_radiograph(dicom(pixels, BitsStored=bits, PhotometricInterpretation="MONOCHROME1", **tags))
    np.testing.assert_array_equal(negative, 255 - positive)


def test_bits_beyond_those_stored_are_dropped():
    overlay = (RAMP | 0xF000).astype(np.uint16)
    tags = {"WindowCenter": 2048, "WindowWidth": 4096}
    np.testing.assert_array_equal(read_radiograph(dicom(overlay, **tags)), read_radiograph(dicom(**tags)))


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 15, 16])
@pytest.mark.parametrize("signed", [False, True])
def test_bits_stored(bits, signed):
    low = -(2 ** (bits - 1)) if signed else 0
    pixels = np.linspace(low, low + 2**bits - 1, 256).astype("i2" if signed else "u2").reshape(16, 16)
    data = dicom(pixels, BitsStored=bits, WindowCenter=low + 2 ** (bits - 1), WindowWidth=2**bits)
    got = read_radiograph(data).astype(int).ravel()
    assert got[0] == 0
    assert got[-1] == 255
    assert np.all(np.diff(got) >= 0)


def test_modality_lut_sequence():
    values = [min(65535, 16 * i) for i in range(4096)][::-1]
    data = dicom(ModalityLUTSequence=lut(0, values, 16), WindowCenter=32768, WindowWidth=65536)
    expected = as_uint8(standard_linear(np.array(values, float), 32768, 65536))
    np.testing.assert_array_equal(read_radiograph(data).ravel(), expected)


def test_voi_lut_sequence_wins_over_the_window_and_clamps_at_its_ends():
    values = list(range(0, 1024, 4))  # 256 entries of 10 bits, first mapped value 500
    data = dicom(VOILUTSequence=lut(500, values, 10), WindowCenter=1, WindowWidth=2)
    index = np.clip(RAMP.astype(int) - 500, 0, 255)
    np.testing.assert_array_equal(read_radiograph(data), as_uint8(np.array(values)[index] / 1023))


def test_voi_lut_with_a_negative_start_over_unsigned_pixels():
    values = list(range(256))
    data = dicom(VOILUTSequence=lut(-100, values, 8), RescaleSlope=1, RescaleIntercept=-1000)
    index = np.clip(RAMP.astype(int) - 1000 + 100, 0, 255)
    np.testing.assert_array_equal(read_radiograph(data), index)


@pytest.mark.parametrize("syntax", [uid.ExplicitVRLittleEndian, uid.ExplicitVRBigEndian, uid.ImplicitVRLittleEndian])
def test_lut_data_as_words(syntax):
    values = np.arange(4096)[::-1] * 16
    item = pydicom.Dataset()
    item.add_new("LUTDescriptor", "US", [4096, 0, 16])
    item.add_new("LUTData", "OW", values.astype(">u2" if syntax == uid.ExplicitVRBigEndian else "<u2").tobytes())
    data = dicom(syntax=syntax, VOILUTSequence=pydicom.Sequence([item]))
    np.testing.assert_array_equal(read_radiograph(data).ravel(), as_uint8(values / 65535))


def test_lut_shorter_than_it_claims():
    sequence = lut(0, [1, 2, 3], 12)
    sequence[0].LUTDescriptor = [4096, 0, 12]
    with pytest.raises(RadiographError, match="3 of 4096 entries"):
        read_radiograph(dicom(VOILUTSequence=sequence))


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_padding_is_black_and_counts_in_no_percentile(photometric):
    pixels = np.random.default_rng(0).integers(1000, 2000, (40, 40)).astype(np.uint16)
    pixels[:, :10] = 4095
    inside = pixels[:, 10:].astype(float)
    low, high = np.percentile(inside, (0.5, 99.5))
    expected = as_uint8((inside - low) / (high - low))
    got = read_radiograph(dicom(pixels, PixelPaddingValue=4095, PhotometricInterpretation=photometric))
    assert not got[:, :10].any()
    np.testing.assert_array_equal(got[:, 10:], expected if photometric == "MONOCHROME2" else 255 - expected)


def test_padding_range_and_sign():
    pixels = np.random.default_rng(0).integers(-500, 500, (20, 20)).astype(np.int16)
    pixels[:4] = -2000
    pixels[4:6] = -1990
    got = read_radiograph(dicom(pixels, PixelPaddingValue=-2000, PixelPaddingRangeLimit=-1990))
    low, high = np.percentile(pixels[6:], (0.5, 99.5))
    assert not got[:6].any()
    np.testing.assert_array_equal(got[6:], as_uint8((pixels[6:] - low) / (high - low)))


def test_nothing_but_padding():
    with pytest.raises(RadiographError, match="nothing but padding"):
        read_radiograph(dicom(np.full((4, 4), 7, np.uint16), PixelPaddingValue=7))


@pytest.mark.parametrize("width", [0, -5])
def test_a_window_that_selects_nothing(width):
    with pytest.warns(RadiographWarning, match=r"<bytes> has a window.*Received: WindowWidth"):
        got = read_radiograph(dicom(WindowCenter=100, WindowWidth=width))
    np.testing.assert_array_equal(got, read_radiograph(dicom()))


def test_unknown_voi_function():
    with pytest.raises(RadiographError, match=r"unknown VOILUTFunction; LINEAR, LINEAR_EXACT or SIGMOID"):
        read_radiograph(dicom(WindowCenter=1, WindowWidth=9, VOILUTFunction="CUBIC"))


# --- transfer syntaxes ----------------------------------------------------------------------------------------------

WINDOW = {"WindowCenter": 2048, "WindowWidth": 4096}


@pytest.mark.parametrize(
    "syntax",
    [
        uid.ImplicitVRLittleEndian,
        uid.ExplicitVRLittleEndian,
        uid.ExplicitVRBigEndian,
        uid.DeflatedExplicitVRLittleEndian,
    ],
)
@pytest.mark.parametrize("dtype", ["u1", "u2", "i2"])
def test_uncompressed(syntax, dtype):
    middle = {"u1": 128, "u2": 2048, "i2": 0}[dtype]
    pixels = (RAMP[:, :33].astype(int) - 2048 * (dtype == "i2")).astype(dtype)
    data = dicom(pixels, syntax, WindowCenter=middle, WindowWidth=4096)
    expected = as_uint8(standard_linear(pixels.astype(float), middle, 4096))
    np.testing.assert_array_equal(read_radiograph(data), expected)
    assert read_header(data).transfer_syntax == syntax


@pytest.mark.parametrize(
    ("syntax", "package"),
    [
        (uid.RLELossless, None),
        (uid.JPEG2000Lossless, None),
        (uid.JPEGLSLossless, "jpeg_ls"),
    ],
)
@pytest.mark.parametrize("signed", [False, True])
def test_lossless(syntax, package, signed):
    if package:
        pytest.importorskip(package)
    pixels = (RAMP.astype(int) - 2048 * signed).astype("i2" if signed else "u2")
    tags = {"WindowCenter": 2048 - 2048 * signed, "WindowWidth": 4096}
    plain = dicom(pixels, **tags)
    dataset = pydicom.dcmread(io.BytesIO(plain))
    dataset.compress(syntax)
    out = io.BytesIO()
    dataset.save_as(out)
    np.testing.assert_array_equal(read_radiograph(out.getvalue()), read_radiograph(plain))


def test_jpeg_lossless():
    pytest.importorskip("gdcm")
    data = dicom(encapsulate([_jpeg_lossless(RAMP)]), uid.JPEGLosslessSV1, **_geometry(RAMP), **WINDOW)
    np.testing.assert_array_equal(read_radiograph(data), read_radiograph(dicom(**WINDOW)))


def _geometry(array: np.ndarray) -> dict[str, int]:
    bits = 12 if array.dtype.itemsize == 2 else 8
    names = ("Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit")
    return dict(zip(names, (*array.shape, 8 * array.dtype.itemsize, bits, bits - 1), strict=True))


def _jpeg_lossless(array: np.ndarray) -> bytes:
    """ITU-T T.81 process 14, selection value 1, 12 bits, with a flat code of 16 categories: hand-made."""
    rows, columns = array.shape
    values = array.astype(int)
    left = np.empty_like(values)
    left[:, 1:] = values[:, :-1]
    left[1:, 0] = values[:-1, 0]
    left[0, 0] = 2048
    bits = []
    for difference in (values - left).ravel().tolist():
        category = abs(difference).bit_length()
        bits.append(f"{category:05b}")  # categories 0 to 15 have 5-bit codes 0 to 15
        if category:
            bits.append(f"{difference if difference > 0 else difference + 2**category - 1:0{category}b}")
    stream = "".join(bits)
    stream += "1" * (-len(stream) % 8)
    scan = int(stream, 2).to_bytes(len(stream) // 8, "big").replace(b"\xff", b"\xff\x00")
    table = bytes([0, 0, 0, 0, 0, 16, *[0] * 11, *range(16)])
    frame = struct.pack(">BHHB3B", 12, rows, columns, 1, 1, 0x11, 0)
    head = b"".join(
        b"\xff" + bytes([marker]) + struct.pack(">H", len(body) + 2) + body
        for marker, body in ((0xC3, frame), (0xC4, table), (0xDA, bytes([1, 1, 0, 1, 0, 0])))
    )
    return b"\xff\xd8" + head + scan + b"\xff\xd9"


def test_jpeg_baseline():
    pixels = film((80, 96))
    encoded = image(pixels, "JPEG", quality=95)
    data = dicom(encapsulate([encoded]), uid.JPEGBaseline8Bit, WindowCenter=128, WindowWidth=256, **_geometry(pixels))
    np.testing.assert_array_equal(read_radiograph(data), read_radiograph(encoded))


def test_jpeg_extended_of_twelve_bits_names_itself():
    encoded = bytearray(image(film((16, 16)), "JPEG"))
    start = encoded.index(b"\xff\xc0")
    encoded[start + 1], encoded[start + 4] = 0xC1, 12
    data = dicom(encapsulate([bytes(encoded)]), uid.JPEGExtended12Bit, **{**_geometry(RAMP), "Rows": 16, "Columns": 16})
    with pytest.raises(
        RadiographError, match=r"JPEG Extended \(Process 2 and 4\).*1\.2\.840\.10008\.1\.2\.4\.51.*pip install"
    ):
        read_radiograph(data)


@pytest.mark.parametrize("syntax", [uid.JPEGLosslessSV1, uid.JPEGLSLossless])
def test_a_missing_decoder_is_named_with_the_line_that_installs_it(syntax, monkeypatch):
    monkeypatch.setattr(get_decoder(syntax), "_available", {})
    with pytest.raises(RadiographError) as caught:
        read_radiograph(dicom(encapsulate([b"\0" * 64]), syntax, **_geometry(RAMP)))
    assert syntax.name in str(caught.value)
    assert str(syntax) in str(caught.value)
    assert 'pip install "cxr-tf[dicom]"' in str(caught.value)


def test_an_unknown_transfer_syntax():
    data = dicom().replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.9\0")
    with pytest.raises(RadiographError, match=r"1\.2\.840\.10008\.1\.2\.9"):
        read_radiograph(data)


@pytest.mark.parametrize("syntax", [uid.ImplicitVRLittleEndian, uid.ExplicitVRLittleEndian, uid.ExplicitVRBigEndian])
def test_without_preamble_or_meta(syntax):
    dataset = pydicom.dcmread(io.BytesIO(dicom(syntax=syntax, **WINDOW)))
    dataset.preamble, dataset.file_meta = None, pydicom.dataset.FileMetaDataset()
    out = io.BytesIO()
    implicit, little = syntax == uid.ImplicitVRLittleEndian, syntax != uid.ExplicitVRBigEndian
    pydicom.dcmwrite(out, dataset, implicit_vr=implicit, little_endian=little)
    assert out.getvalue()[128:132] != b"DICM"
    np.testing.assert_array_equal(read_radiograph(out.getvalue()), read_radiograph(dicom(**WINDOW)))


def test_meta_without_preamble():
    np.testing.assert_array_equal(read_radiograph(dicom(**WINDOW)[132:]), read_radiograph(dicom(**WINDOW)))


# --- PNG and JPEG ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA", "RGB", "RGBA", "I;16"])
def test_png_equals_tensorflow(mode):
    tf = pytest.importorskip("tensorflow")
    array = film((57, 64, 4) if mode == "RGBA" else (57, 64, 3) if mode in ("RGB", "P") else (57, 64))
    if mode == "I;16":
        data = image((array.astype(np.int64) * 257 - (array > 0) * 77).astype(np.uint16))
    else:
        data = image(array, mode=mode)
    theirs = tf.io.decode_png(data, channels=1).numpy()[..., 0]
    assert np.abs(read_radiograph(data).astype(int) - theirs).max() <= (0 if mode in ("L", "1", "LA", "I;16") else 1)


@pytest.mark.parametrize("color", [False, True])
@pytest.mark.parametrize("options", [{}, {"quality": 40}, {"progressive": True}, {"subsampling": 0}, {"quality": 100}])
def test_jpeg_equals_tensorflow(color, options):
    tf = pytest.importorskip("tensorflow")
    data = image(film((61, 83, 3) if color else (61, 83)), "JPEG", **options)
    theirs = tf.io.decode_jpeg(data, channels=1, dct_method="INTEGER_ACCURATE").numpy()[..., 0]
    np.testing.assert_allclose(read_radiograph(data).astype(int), theirs, atol=1)


def test_real_jpegs_equal_tensorflow(cxr_data):
    tf = pytest.importorskip("tensorflow")
    for path in sorted((cxr_data / "images").glob("*/*.jpg"))[::200]:
        theirs = tf.io.decode_jpeg(path.read_bytes(), channels=1, dct_method="INTEGER_ACCURATE").numpy()[..., 0]
        np.testing.assert_allclose(read_radiograph(path).astype(int), theirs, atol=1)


def test_sixteen_bit_png_is_its_high_byte():
    array = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(read_radiograph(image(array)), array >> 8)


def test_twelve_bits_in_a_sixteen_bit_png_warn(tmp_path):
    path = tmp_path / "dim.png"
    path.write_bytes(image(RAMP))
    with pytest.warns(RadiographWarning, match=r"dim\.png is a 16-bit PNG.*Received: highest value 15"):
        np.testing.assert_array_equal(read_radiograph(path), RAMP >> 8)


def test_the_ending_does_not_matter(tmp_path):
    for kind, data in (("png", image(film((8, 9)))), ("jpeg", image(film((8, 9)), "JPEG")), ("dicom", dicom())):
        path = tmp_path / "film.txt"
        path.write_bytes(data)
        assert read_header(path).format == kind
        assert read_radiograph(path).shape == (read_header(path).height, read_header(path).width)
        np.testing.assert_array_equal(read_radiograph(path), read_radiograph(data))
        np.testing.assert_array_equal(read_radiograph(str(path)), read_radiograph(data))


# --- refused --------------------------------------------------------------------------------------------------------


def both_refuse(data: bytes, match: str, **options: float) -> None:
    for read in (read_radiograph, read_header):
        with pytest.raises(RadiographError, match=match) as caught:
            read(data, **options)
        assert str(caught.value).startswith("<bytes> ")
        assert "Secret" not in str(caught.value)


def big_png(side: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    packer = zlib.compressobj(9)
    row = bytes(1 + side // 8)
    rows = b"".join(packer.compress(row * 100) for _ in range(side // 100)) + packer.flush()
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_png_bomb():
    data = big_png(30_000)
    assert len(data) < 200_000
    both_refuse(data, r"100 megapixels.*Received: 30000 x 30000 pixels")


def test_the_bound_is_ours_and_not_pillows(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    data = image(film((100, 100)))
    assert read_radiograph(data).shape == (100, 100)
    assert Image.MAX_IMAGE_PIXELS == 1000
    with pytest.raises(RadiographError, match="max_megapixels"):
        read_radiograph(data, max_megapixels=0.009)


def test_dicom_and_jpeg_bounds():
    both_refuse(dicom(Rows=30_000, Columns=30_000), "Received: 30000 x 30000 pixels")
    jpeg = bytearray(image(film((16, 16)), "JPEG"))
    start = jpeg.index(b"\xff\xc0")
    jpeg[start + 5 : start + 9] = struct.pack(">HH", 40_000, 40_000)
    both_refuse(bytes(jpeg), "Received: 40000 x 40000 pixels")


def test_deflated_bomb():
    plain = dicom(syntax=uid.DeflatedExplicitVRLittleEndian)
    meta_end = 144 + struct.unpack_from("<I", plain, 140)[0]
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    zeros = bytes(2**20)
    bomb = packer.compress(b"\x09\x00\x10\x00OB\0\0" + struct.pack("<I", 2**30))
    bomb += b"".join(packer.compress(zeros) for _ in range(80)) + packer.flush()
    assert len(bomb) < 100_000
    both_refuse(plain[:meta_end] + bomb, "inflates to more than", max_megapixels=1)


@pytest.mark.parametrize("kind", ["jpeg", "jpeg2000"])
def test_a_compressed_image_larger_than_the_header_says(kind):
    pixels = film((64, 80))
    if kind == "jpeg":
        data = dicom(encapsulate([image(pixels, "JPEG")]), uid.JPEGBaseline8Bit, **{**_geometry(pixels), "Rows": 16})
    else:
        encoded = image(pixels, "JPEG2000", no_jp2=True)
        data = dicom(encapsulate([encoded]), uid.JPEG2000Lossless, **{**_geometry(pixels), "Rows": 16})
    with pytest.raises(RadiographError, match=r"16 x 80 pixels\. Received: 64 x 80"):
        read_radiograph(data)


def test_multi_frame_color_and_palette():
    both_refuse(dicom(NumberOfFrames=3), "multi-frame.*Received: NumberOfFrames 3")
    rgb = {"SamplesPerPixel": 3, "PlanarConfiguration": 0, "PhotometricInterpretation": "RGB"}
    both_refuse(dicom(**rgb), "gray.*Received: .RGB., SamplesPerPixel 3")
    both_refuse(dicom(PhotometricInterpretation="PALETTE COLOR"), "Received: .PALETTE COLOR")


def test_cmyk_jpeg():
    out = io.BytesIO()
    Image.new("CMYK", (8, 8)).save(out, "JPEG")
    with pytest.raises(RadiographError, match="Received: CMYK"):
        read_radiograph(out.getvalue())


@pytest.mark.parametrize(
    ("elements", "match"),
    [
        ({"BitsStored": 6}, "BitsStored 6"),
        ({"HighBit": 15}, "HighBit 11 is expected.*Received: HighBit 15"),
        ({"BitsAllocated": 32}, "BitsAllocated 32"),
        ({"PixelData": None}, "without pixel data"),
        ({"PixelRepresentation": None}, "without PixelRepresentation"),
        ({"RescaleSlope": 0, "RescaleIntercept": 0}, "RescaleSlope"),
        ({"Rows": 65}, "truncated"),
    ],
)
def test_unfit_dicom(elements, match):
    with pytest.raises(RadiographError, match=match):
        read_radiograph(dicom(**elements))


def test_no_film_at_all(tmp_path):
    both_refuse(b"", "is empty")
    both_refuse(b"hello", "no DICOM, PNG or JPEG")
    both_refuse(b"\x08\x00" + b"hello" * 100, "<bytes> ")
    both_refuse(dicom(Rows=None), "holds no image")
    for read in (read_radiograph, read_header):
        with pytest.raises(RadiographError, match=r"nowhere\.dcm cannot be opened: No such file"):
            read(tmp_path / "nowhere.dcm")
        with pytest.raises(RadiographError, match="folder"):
            read(tmp_path)


@pytest.mark.parametrize("rescue", [False, True])
@pytest.mark.parametrize("kind", ["png", "jpeg", "progressive", "dicom", "dicom-jpeg", "deflated", "rle", "jpeg2000"])
def test_truncated(kind, rescue, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", rescue)
    pixels = film((90, 100))
    data = {
        "png": lambda: image(pixels),
        "jpeg": lambda: image(pixels, "JPEG"),
        "progressive": lambda: image(pixels, "JPEG", progressive=True),
        "dicom": dicom,
        "dicom-jpeg": lambda: dicom(encapsulate([image(pixels, "JPEG")]), uid.JPEGBaseline8Bit, **_geometry(pixels)),
        "deflated": lambda: dicom(syntax=uid.DeflatedExplicitVRLittleEndian),
        "rle": lambda: _compressed(uid.RLELossless),
        "jpeg2000": lambda: _compressed(uid.JPEG2000Lossless),
    }[kind]()
    read_radiograph(data)
    for part in (0.3, 0.5, 0.9, 0.99):
        with pytest.raises(RadiographError):
            read_radiograph(data[: int(part * len(data))])
    with pytest.raises(RadiographError):
        read_radiograph(data[:-9])
    assert rescue is ImageFile.LOAD_TRUNCATED_IMAGES


def _compressed(syntax: str) -> bytes:
    dataset = pydicom.dcmread(io.BytesIO(dicom()))
    dataset.compress(syntax)
    out = io.BytesIO()
    dataset.save_as(out)
    return out.getvalue()


def test_a_png_with_a_wrong_checksum():
    data = bytearray(image(film((40, 40))))
    data[len(data) // 2] ^= 4
    with pytest.raises(RadiographError, match="checksum"):
        read_radiograph(bytes(data))


def test_mutated_files_raise_nothing_else():
    pixels = film((40, 44))
    seeds = [
        image(pixels),
        image(pixels, "JPEG"),
        dicom(**WINDOW),
        dicom(VOILUTSequence=lut(0, [1, 2, 3], 8)),
        dicom(encapsulate([image(pixels, "JPEG")]), uid.JPEGBaseline8Bit, **_geometry(pixels)),
        _compressed(uid.RLELossless),
        _compressed(uid.JPEG2000Lossless),
        dicom(syntax=uid.DeflatedExplicitVRLittleEndian),
    ]
    rng = np.random.default_rng(0)
    refused = 0
    for turn in range(600):
        data = bytearray(seeds[turn % len(seeds)])
        for _ in range(rng.integers(1, 6)):
            place = int(rng.integers(len(data) if rng.random() < 0.3 else min(len(data), 700)))
            data[place] = int(rng.integers(256))
        for read in (read_header, read_radiograph):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                try:
                    read(bytes(data))
                except RadiographError as error:
                    refused += 1
                    assert str(error).startswith("<bytes> ")
            assert all(issubclass(item.category, RadiographWarning) for item in caught)
    assert refused > 50


# --- header ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("elements", "age"),
    [
        ({"PatientAge": "045Y"}, 45.0),
        ({"PatientAge": "006M"}, 0.5),
        ({"PatientAge": "026W"}, 26 * 7 / 365.25),
        ({"PatientAge": "010D"}, 10 / 365.25),
        ({"PatientBirthDate": "19800615", "StudyDate": "20200615"}, 40.0),
        ({"PatientBirthDate": "19800616", "StudyDate": "20200615"}, 39.0),
        ({"PatientAge": "999Y"}, None),
        ({"PatientBirthDate": "20210101", "StudyDate": "20200615"}, None),
        ({"PatientBirthDate": "1980", "StudyDate": "20200615"}, None),
        ({}, None),
    ],
)
def test_age(elements, age):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = dicom(**elements)
    found = read_header(data).age
    assert found == age if age is None else found == pytest.approx(age, abs=0.01)


def test_header_says_what_the_file_says_and_no_name():
    data = dicom(
        StudyInstanceUID="1.2.3.4", ViewPosition="LL", PatientSex="O", PixelSpacing=[0.14, 0.15], PatientAge="033Y"
    )
    header = read_header(data)
    syntax = str(uid.ExplicitVRLittleEndian)
    ids = ("p1", "1.2.3.4", "1.2.3")
    assert header == Header("dicom", 64, 64, syntax, "MONOCHROME2", *ids, "LATERAL", None, 33.0, (0.14, 0.15))
    assert "Secret" not in repr(header)
    assert "p1" not in repr(header)
    assert "1.2.3.4" not in repr(header)


@pytest.mark.parametrize(
    ("typed", "view"),
    [
        *(("AP", "AP"), (" pa ", "PA"), ("LL", "LATERAL"), ("Lat", "LATERAL"), ("LLD", "LLD"), ("", None)),
        *(("DOE JANE", None), (["PA", "AP"], None), ("CHEST 1 VIEW", None)),
    ],
)
@pytest.mark.filterwarnings("ignore:Invalid value for VR CS")
def test_a_view_is_a_known_one_or_none(typed, view):
    assert read_header(dicom(ViewPosition=typed)).view == view


def test_header_of_png_and_jpeg():
    assert read_header(image(film((8, 9)))) == Header("png", 8, 9)
    assert read_header(image(film((8, 9)), "JPEG")) == Header("jpeg", 8, 9)


def test_header_needs_no_pixels(tmp_path):
    path = tmp_path / "head.dcm"
    path.write_bytes(dicom()[:-5000])
    assert read_header(path).height == 64
    with pytest.raises(RadiographError, match=r"head\.dcm "):
        read_radiograph(path)


# --- what surrounds it ----------------------------------------------------------------------------------------------


def test_pydicom_is_quiet_and_settings_come_back(caplog):
    odd = dicom(PixelData=RAMP.tobytes() + bytes(64))  # pydicom warns of the excess
    filters = list(warnings.filters)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_radiograph(odd).shape == (64, 64)
    assert not caplog.records
    assert warnings.filters == filters


def test_threads_leave_the_process_as_it_was():
    before = list(warnings.filters), ImageFile.LOAD_TRUNCATED_IMAGES
    data = [dicom(), image(film((60, 60))), b"broken"]
    failures = []

    def work() -> None:
        for turn in range(30):
            try:
                read_radiograph(data[turn % 3])
            except RadiographError:
                continue
            except Exception as error:
                failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert (list(warnings.filters), ImageFile.LOAD_TRUNCATED_IMAGES) == before


def test_it_imports_numpy_pydicom_and_pillow_alone():
    code = (
        "import sys, cxr_tf.data.radiograph; "
        "print(sorted({'tensorflow', 'keras', 'pandas', 'scipy', 'sklearn', 'matplotlib'} & set(sys.modules)))"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("elements", "ratio"),
    [
        ({"PixelSpacing": [0.2, 0.1]}, "2.00"),
        ({"ImagerPixelSpacing": [0.1, 0.2]}, "0.50"),
        ({"PixelAspectRatio": [6, 5]}, "1.20"),
        ({"PixelSpacing": [0.143, 0.1431]}, None),
        ({"PixelSpacing": [0.0, 0.1]}, None),
        ({}, None),
    ],
)
def test_pixels_that_are_not_square_are_kept_and_said(elements, ratio):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pixels = read_radiograph(dicom(**elements))
    np.testing.assert_array_equal(pixels, read_radiograph(dicom()))
    said = [str(one.message) for one in caught if issubclass(one.category, RadiographWarning)]
    assert len(said) == (ratio is not None) and all(
        f"not square ({ratio} times as high as wide)" in text for text in said
    )
