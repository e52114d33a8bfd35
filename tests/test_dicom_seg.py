from __future__ import annotations

import hashlib
import shutil
import subprocess

import numpy as np
import pydicom
import pytest
from pydicom import uid

from cxr_tf.data.radiograph import read_radiograph
from cxr_tf.dicom_seg import NOTICE, SegmentationError, SegmentationWriter

highdicom = pytest.importorskip("highdicom")

MODEL = {"algorithm": "siim-multitask", "version": "3f2a", "threshold": 0.35}
STUDY = "1.2.826.0.1.3680043.8.498.1"
CR = uid.ComputedRadiographyImageStorage

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of what is malformed here on purpose


def _film(
    path,
    shape=(37, 53),
    sop_class=uid.ComputedRadiographyImageStorage,
    without=(),
    encoding=None,
    bare=False,
    **changes,
):
    """A film of a patient, as small as films get, with changes."""
    film = pydicom.Dataset()
    film.SOPClassUID, film.SOPInstanceUID = sop_class, f"{STUDY}.2.1"
    film.StudyInstanceUID, film.SeriesInstanceUID = STUDY, f"{STUDY}.2"
    film.Modality = "CR" if sop_class == CR else "DX"
    film.PatientName, film.PatientID = "Quastelhuber^Zenobia", "ZQ1"
    film.PatientBirthDate, film.PatientSex, film.PatientAge = "19310923", "F", "089Y"
    film.StudyDate, film.StudyTime, film.StudyID, film.AccessionNumber = "20201124", "101112", "7", "A7"
    film.ReferringPhysicianName, film.StudyDescription = "", "Thorax"
    film.PatientOrientation = ["L", "F"]
    film.SamplesPerPixel, film.PhotometricInterpretation = 1, "MONOCHROME1"
    film.Rows, film.Columns = shape
    film.BitsAllocated, film.BitsStored, film.HighBit, film.PixelRepresentation = 16, 12, 11, 0
    film.ImagerPixelSpacing = [0.2, 0.2]
    film.PixelData = np.random.default_rng(0).integers(0, 4096, shape, np.uint16).tobytes()
    film["PixelData"].VR = "OW"
    for keyword, value in changes.items():
        setattr(film, keyword, value)
    for keyword in without:
        del film[keyword]
    film.file_meta = pydicom.dataset.FileMetaDataset()
    film.file_meta.TransferSyntaxUID = encoding or uid.ExplicitVRLittleEndian
    film.file_meta.MediaStorageSOPClassUID = sop_class
    film.file_meta.MediaStorageSOPInstanceUID = f"{STUDY}.2.1"
    with pydicom.config.disable_value_validation():
        pydicom.dcmwrite(path, film, enforce_file_format=True)
    if bare:  # as old machines write them
        path.write_bytes(path.read_bytes()[132:])
    return path


def _mask(shape=(37, 53)):
    mask = np.zeros(shape, bool)
    mask[3:20, 5:17] = mask[-1, -9:] = True
    return mask


def _written(tmp_path, finding="opacity", mask=None, **given):
    film = _film(tmp_path / "film.dcm", **given)
    mask = _mask() if mask is None else mask
    SegmentationWriter(finding, **MODEL)(film, mask, tmp_path / "film.seg.dcm")
    assert _judged(tmp_path / "film.seg.dcm") == []
    return highdicom.seg.segread(tmp_path / "film.seg.dcm")


def _judged(path):
    """What dicom3tools' validator calls an error; nothing where it is not installed."""
    if shutil.which("dciodvfy") is None:
        return []
    done = subprocess.run(["dciodvfy", "-new", path], capture_output=True, text=True, timeout=60)
    said = (done.stdout + done.stderr).splitlines()
    assert "Segmentation" in said
    return [line for line in said if line.startswith("Error")]


@pytest.mark.parametrize(
    "sop_class",
    [
        uid.ComputedRadiographyImageStorage,
        uid.DigitalXRayImageStorageForPresentation,
        uid.DigitalXRayImageStorageForProcessing,
        uid.SecondaryCaptureImageStorage,
    ],
    ids=lambda value: value.name,
)
def test_it_points_to_its_film_and_holds_the_mask(tmp_path, sop_class):
    seg = _written(tmp_path, sop_class=sop_class)
    assert (pydicom.dcmread(tmp_path / "film.seg.dcm").pixel_array == _mask()).all()  # as pydicom alone reads it
    got = seg.get_pixels_by_source_instance([f"{STUDY}.2.1"], assert_missing_frames_are_empty=False)
    np.testing.assert_array_equal(got[0, :, :, 0], _mask())
    (series,) = seg.ReferencedSeriesSequence
    assert series.SeriesInstanceUID == f"{STUDY}.2"
    (instance,) = series.ReferencedInstanceSequence
    assert (instance.ReferencedSOPClassUID, instance.ReferencedSOPInstanceUID) == (sop_class, f"{STUDY}.2.1")
    assert "FrameOfReferenceUID" not in seg and "PixelMeasuresSequence" not in seg.SharedFunctionalGroupsSequence[0]
    assert seg.SeriesInstanceUID != f"{STUDY}.2" and seg.SOPInstanceUID != f"{STUDY}.2.1"


def test_patient_and_study_are_the_films_own(tmp_path):
    seg, film = _written(tmp_path), pydicom.dcmread(tmp_path / "film.dcm")
    patient = ["PatientName", "PatientID", "PatientBirthDate", "PatientSex", "PatientAge", "PatientOrientation"]
    study = ["StudyInstanceUID", "StudyDate", "StudyTime", "StudyID", "AccessionNumber", "StudyDescription"]
    for keyword in patient + study:
        assert seg[keyword].value == film[keyword].value, keyword


def test_it_says_what_the_mask_shows_what_made_it_and_that_it_is_for_research(tmp_path):
    seg = _written(tmp_path)
    (segment,) = seg.SegmentSequence
    codes = [segment.SegmentedPropertyCategoryCodeSequence, segment.SegmentedPropertyTypeCodeSequence]
    assert [(c[0].CodeValue, c[0].CodingSchemeDesignator, c[0].CodeMeaning) for c in codes] == [
        ("49755003", "SCT", "Morphologically Abnormal Structure"),
        ("112001", "DCM", "Opacity"),
    ]
    assert segment.AnatomicRegionSequence[0].CodeMeaning == "Lung"
    assert segment.SegmentAlgorithmType == "AUTOMATIC" and seg.SegmentationType == "BINARY"
    (algorithm,) = segment.SegmentationAlgorithmIdentificationSequence
    assert algorithm.AlgorithmName == "cxr_tf siim-multitask" and algorithm.AlgorithmVersion.endswith(" 3f2a")
    assert "0.35" in algorithm.AlgorithmParameters
    for said in (seg.SeriesDescription, seg.ContentDescription, segment.SegmentDescription):
        assert NOTICE in said
    assert seg.ContentLabel == "RESEARCH_USE"


def test_a_mask_of_lungs_is_called_lungs(tmp_path):
    (segment,) = _written(tmp_path, "lung").SegmentSequence
    assert segment.SegmentedPropertyCategoryCodeSequence[0].CodeMeaning == "Anatomical Structure"
    assert segment.SegmentedPropertyTypeCodeSequence[0].CodeValue == "39607008"
    with pytest.raises(SegmentationError, match=r'one of opacity, lung\. Did you mean "lung"'):
        SegmentationWriter("lungs", **MODEL)


def test_where_nothing_was_found_it_says_so(tmp_path):
    seg = _written(tmp_path, mask=np.zeros((37, 53), bool))
    assert seg.NumberOfFrames == 1 and not seg.pixel_array.any()


@pytest.mark.parametrize(
    ("changes", "left"),
    [
        ({"PatientAge": "81"}, {"PatientAge": None}),
        ({"PatientSex": "W"}, {"PatientSex": ""}),
        ({"PatientBirthDate": "23.9.1931"}, {"PatientBirthDate": ""}),
        ({"StudyTime": "noon"}, {"StudyTime": ""}),
        ({"AccessionNumber": "A" * 40}, {"AccessionNumber": ""}),
        ({"PixelSpacing": [0, 0]}, {}),
        ({"PixelSpacing": [0.2, 0.2]}, {}),
        ({"FrameOfReferenceUID": f"{STUDY}.9"}, {"FrameOfReferenceUID": None}),
        ({"without": ["PatientName", "PatientSex", "StudyDate", "StudyID", "PatientOrientation"]}, {"PatientName": ""}),
        ({"encoding": uid.ImplicitVRLittleEndian}, {}),
        ({"encoding": uid.DeflatedExplicitVRLittleEndian}, {}),
        ({"SpecificCharacterSet": ["", "ISO 2022 IR 87"], "PatientName": "Yamada^Tarou=山田^太郎"}, {}),
        ({"SpecificCharacterSet": "ISO_IR 192", "PatientName": "Süß^Äöü"}, {}),
        ({"LossyImageCompression": "01"}, {}),
        ({"bare": True}, {}),
    ],
    ids=lambda value: "-".join(value) or "kept" if isinstance(value, dict) else None,
)
def test_headers_of_the_real_world(tmp_path, changes, left):
    seg, film = _written(tmp_path, **changes), pydicom.dcmread(tmp_path / "film.dcm", force=True)
    assert (seg.pixel_array == _mask()).all()
    for keyword, value in left.items():
        assert (seg.get(keyword) or "") == (value or ""), keyword
    if "PatientName" not in left:
        assert seg.PatientName == film.PatientName


@pytest.mark.parametrize("keyword", ["SOPInstanceUID", "SOPClassUID", "StudyInstanceUID", "SeriesInstanceUID"])
def test_a_film_that_nothing_can_point_to_is_named(tmp_path, keyword):
    film = _film(tmp_path / "film.dcm", without=[keyword])
    with pytest.raises(SegmentationError, match=f"film.dcm: has no {keyword}"):
        SegmentationWriter("opacity", **MODEL)(film, _mask(), tmp_path / "film.seg.dcm")
    assert [file.name for file in tmp_path.iterdir()] == ["film.dcm"]


@pytest.mark.parametrize("keyword", ["SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID"])
def test_what_is_no_uid_points_to_nothing(tmp_path, keyword):
    film = _film(tmp_path / "film.dcm", **{keyword: "1.2.abc"})
    with pytest.raises(SegmentationError, match=f"film.dcm: its {keyword} is no UID"):
        SegmentationWriter("opacity", **MODEL)(film, _mask(), tmp_path / "film.seg.dcm")
    assert [file.name for file in tmp_path.iterdir()] == ["film.dcm"]


def test_what_cannot_be_derived_from_is_named_without_the_patient(tmp_path, capfd):
    film = _film(tmp_path / "film.dcm", SOPClassUID="1.2.3.4", PatientName="Quastelhuber^" + "Z" * 70)
    with pytest.raises(SegmentationError) as raised:
        SegmentationWriter("opacity", **MODEL)(film, _mask(), tmp_path / "film.seg.dcm")
    assert "film.dcm" in str(raised.value)
    said = str(raised.value) + "".join(capfd.readouterr())
    assert "Quastelhuber" not in said
    assert [file.name for file in tmp_path.iterdir()] == ["film.dcm"]


def test_the_film_is_not_touched(tmp_path):
    film = _film(tmp_path / "film.dcm")
    before = hashlib.sha256(film.read_bytes()).hexdigest(), film.stat().st_mtime_ns
    SegmentationWriter("opacity", **MODEL)(film, _mask(), tmp_path / "film.seg.dcm")
    assert (hashlib.sha256(film.read_bytes()).hexdigest(), film.stat().st_mtime_ns) == before
    assert read_radiograph(film).shape == (37, 53)


def test_without_highdicom_the_install_line_is_given(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "highdicom", None)
    with pytest.raises(SegmentationError, match=r'pip install "cxr-tf\[dicom\]"'):
        SegmentationWriter("opacity", **MODEL)
