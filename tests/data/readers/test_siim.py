"""The challenge's folder: its traps, and what does not fit together."""

from __future__ import annotations

import csv
import warnings
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from cxr_tf.data.manifest import ManifestError, ManifestWarning, class_names, labels, row_mask
from cxr_tf.data.readers.siim import CLASSES, read_siim
from cxr_tf.errors import CxrError

NEGATIVE, TYPICAL, INDETERMINATE, ATYPICAL = CLASSES
HEIGHT, WIDTH = 40, 32


def write_film(path: Path, patient: str | None, **header) -> None:
    film = Dataset()
    film.file_meta = FileMetaDataset()
    film.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    film.file_meta.MediaStorageSOPClassUID = film.SOPClassUID = "1.2.840.10008.5.1.4.1.1.1.1"
    film.file_meta.MediaStorageSOPInstanceUID = film.SOPInstanceUID = generate_uid()
    film.PatientName = "Secret^Name"
    if patient is not None:
        film.PatientID = patient
    film.Rows, film.Columns = HEIGHT, WIDTH
    film.SamplesPerPixel, film.PhotometricInterpretation = 1, "MONOCHROME2"
    film.BitsAllocated, film.BitsStored, film.HighBit, film.PixelRepresentation = 16, 12, 11, 0
    film.PixelData = np.zeros((HEIGHT, WIDTH), np.uint16).tobytes()
    for name, value in header.items():
        setattr(film, name, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    pydicom.dcmwrite(path, film, enforce_file_format=True)


class Folder:
    """A small challenge folder that tests can spoil before they write it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.studies = {"s0": NEGATIVE, "s1": TYPICAL, "s2": INDETERMINATE, "s3": ATYPICAL}
        self.study_header, self.image_header = ["id", *CLASSES], ["id", "boxes", "label", "StudyInstanceUID"]
        boxes = "[{'x': 2.5, 'y': 4.0, 'width': 10.0, 'height': 20.25}, {'x': 20, 'y': 1, 'width': 5, 'height': 6}]"
        self.images = [
            ["i0_image", "", "none 1 0 0 1 1", "s0"],
            ["i1_image", boxes, "opacity 1 2.5 4.0 12.5 24.25 opacity 1 20 1 25 7", "s1"],
            ["i2_image", "", "none 1 0 0 1 1", "s1"],  # a second image, that nobody annotated
            ["i3_image", "", "none 1 0 0 1 1", "s2"],
            ["i4_image", "[{'x': 0, 'y': 0, 'width': 8, 'height': 8}]", "opacity 1 0 0 8 8", "s3"],
        ]
        self.patients = {"s0": "P-A", "s1": "P-B", "s2": "P-A", "s3": "P-C"}
        for name, _, _, study in self.images:
            self.film(name.removesuffix("_image"), study)

    def film(self, name: str, study: str, **header) -> Path:
        path = self.root / "train" / study / f"series_{name}" / f"{name}.dcm"
        write_film(path, self.patients.get(study, "P-Z"), **header)
        return path

    def read(self, **options):
        rows = [[f"{study}_study", *(int(kind == name) for name in CLASSES)] for study, kind in self.studies.items()]
        self.write("train_study_level.csv", [self.study_header, *rows])
        self.write("train_image_level.csv", [self.image_header, *self.images])
        return read_siim(self.root, **options)

    def write(self, name: str, rows: list[list]) -> None:
        with (self.root / name).open("w", newline="") as file:
            csv.writer(file).writerows(rows)


@pytest.fixture
def folder(tmp_path) -> Folder:
    return Folder(tmp_path / "siim")


def test_rows_labels_patients_and_masks(folder):
    folder.film("i1", "s1", ViewPosition="AP", PatientSex="F", PatientAge="061Y")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        df = folder.read()
    assert class_names(df) == list(CLASSES)
    np.testing.assert_array_equal(labels(df).argmax(axis=1), [0, 1, 1, 2, 3])
    assert list(df["study_id"]) == ["s0", "s1", "s1", "s2", "s3"]
    assert list(df["patient_id"]) == ["P-A", "P-B", "P-B", "P-A", "P-C"]  # a patient with two studies
    assert list(df["source"]) == ["siim"] * 5 and list(df["split"]) == [None] * 5
    assert df["image"][1] == str(folder.root / "train" / "s1" / "series_i1" / "i1.dcm")
    assert df["boxes"][1] == [[2.5, 4.0, 10.0, 20.25], [20.0, 1.0, 5.0, 6.0]]
    assert (df["view"][1], df["sex"][1], df["age"][1]) == ("AP", "F", 61.0)
    assert df["view"][0] is None and df["sex"][0] is None and np.isnan(df["age"][0])
    # Negative without boxes: empty. Positive without boxes: unknown, which is not the same.
    assert list(df["mask_known"]) == [True, True, False, False, True]
    sums = [None if mask is None else mask.sum() for mask in (row_mask(df.iloc[i], HEIGHT, WIDTH) for i in range(5))]
    assert sums == [0, 10 * 20 + 5 * 6, None, None, 64]
    assert not any("Secret" in str(value) for value in df.to_numpy().ravel())


def test_progress_reaches_the_end(folder):
    calls = []
    folder.read(progress=lambda done, total: calls.append((done, total)))
    assert calls == [(i, 5) for i in range(1, 6)]


def test_a_header_that_cannot_be_read_stays_with_its_study(folder):
    path = folder.film("i2", "s1")
    path.write_bytes(path.read_bytes()[:150])
    (folder.root / "train" / "s3" / "series_i4" / "i4.dcm").write_bytes(b"")
    with pytest.warns(ManifestWarning) as caught:
        df = folder.read()
    assert list(df["patient_id"]) == ["P-A", "P-B", "P-B", "P-A", "study s3"]
    texts = sorted(str(warning.message) for warning in caught)
    assert texts[0].startswith("1 of 4 studies have no PatientID")
    assert "2 of 5 files have no header that can be read" in texts[1] and "reject" in texts[1]


def test_a_study_without_patients_is_a_patient_of_its_own(folder):
    for name in ("i1", "i2"):
        write_film(folder.root / "train" / "s1" / f"series_{name}" / f"{name}.dcm", "" if name == "i1" else None)
    with pytest.warns(ManifestWarning, match="1 of 4 studies have no PatientID"):
        df = folder.read()
    assert list(df["patient_id"]) == ["P-A", "study s1", "study s1", "P-A", "P-C"]


def test_the_test_half_has_no_labels(folder):
    write_film(folder.root / "test" / "t1" / "series" / "j1.dcm", "P-T")
    df = folder.read(split="test")
    assert list(df["split"]) == ["test"] and list(df["study_id"]) == ["t1"] and list(df["patient_id"]) == ["P-T"]
    assert np.isnan(labels(df)).all() and not df["mask_known"].any()
    with pytest.raises(ManifestError, match=r'must be "train" or "test". Received: \'valid\''):
        folder.read(split="valid")


def test_a_folder_of_another_kind_is_told_what_it_should_hold(folder, tmp_path):
    folder.read()
    for name in ("train_study_level.csv", "train_image_level.csv"):
        (folder.root / name).rename(tmp_path / "aside")
        with pytest.raises(
            ManifestError, match=rf"there is no {name} in it. A SIIM-FISABIO-RSNA folder holds train_study"
        ):
            read_siim(folder.root)
        (tmp_path / "aside").rename(folder.root / name)
    (tmp_path / "empty").mkdir()
    for wrong in (tmp_path / "empty", tmp_path / "nowhere", folder.root / "train"):
        with pytest.raises(ManifestError, match=r"no folder 'train' in it. A SIIM"):
            read_siim(wrong)
    (tmp_path / "empty" / "test").mkdir()
    with pytest.raises(ManifestError, match="no test/<study>"):
        read_siim(tmp_path / "empty", split="test")


def missing_column(folder):
    folder.study_header[2] = "Typical Apearance"


def unknown_image_column(folder):
    folder.image_header.append("extra")
    folder.images = [[*row, "1"] for row in folder.images]


def fifth_class(folder):
    folder.study_header.append("Normal")


def duplicate_image(folder):
    folder.images.append(folder.images[0])


def no_ending(folder):
    folder.images[0][0] = "i0"


def no_class(folder):
    folder.studies["s1"] = "none of them"


def study_not_listed(folder):
    del folder.studies["s3"]


def study_without_images(folder):
    folder.studies["s9"] = TYPICAL


def row_without_file(folder):
    folder.images.append(["i9_image", "", "none 1 0 0 1 1", "s0"])


def file_without_row(folder):
    folder.film("i9", "s0")


def file_twice(folder):
    folder.film("i0", "s1")


def other_study(folder):
    folder.images[0][3] = "s2"


def boxes_not_read(folder):
    folder.images[4][1] = "[{'x': 0, 'y': 0}]"


def label_not_read(folder):
    folder.images[4][2] = "opacity 1 0 0 8"


def label_differs(folder):
    folder.images[4][2] = "opacity 1 0 0 8 12"


def label_none(folder):
    folder.images[4][2] = "none 1 0 0 1 1"


def label_without_boxes(folder):
    folder.images[3][2] = "opacity 1 0 0 8 8"


def negative_with_boxes(folder):
    folder.studies["s3"] = NEGATIVE


def box_outside(folder):
    folder.images[4][1:3] = "[{'x': 400, 'y': 0, 'width': 8, 'height': 8}]", "opacity 1 400 0 408 8"


def box_without_area(folder):
    folder.images[4][1:3] = "[{'x': 4, 'y': 0, 'width': 0, 'height': 8}]", "opacity 1 4 0 4 8"


def two_patients_in_a_study(folder):
    folder.patients["s1"] = "P-X"
    folder.film("i2", "s1")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (missing_column, "column 'Typical Appearance' is missing. Did you mean \"Typical Apearance\"?"),
        (unknown_image_column, "train_image_level.csv: column 'extra' is unknown"),
        (no_ending, "line 2: an id must be <name>_image. Received: 'i0'"),
        (no_class, "study s1 must have a 1 in one class and 0 in the others. Received: ['0', '0', '0', '0']"),
        (duplicate_image, "id i0_image occurs twice"),
        (study_not_listed, "image i4: its study s3 is not in train_study_level.csv"),
        (study_without_images, "study s9 has no image in train_image_level.csv"),
        (row_without_file, "image i9: there is no file train/s0/<series>/i9.dcm"),
        (file_without_row, "no row names the file train/s0/series_i9/i9.dcm"),
        (file_twice, "image i0 has two files, in studies s0 and s1"),
        (other_study, "image i0: its study is s2, but its file is in train/s0"),
        (boxes_not_read, "image i4: a box must be [x, y, width, height]. Received: \"[{'x': 0, 'y': 0}]\""),
        (label_not_read, "image i4: label must be 'opacity 1 x1 y1 x2 y2 ...'"),
        (label_differs, "image i4: boxes and label differ"),
        (label_none, "image i4: boxes and label differ"),
        (label_without_boxes, "image i3: boxes and label differ"),
        (negative_with_boxes, "image i4: has boxes, but its study s3 is Negative for Pneumonia"),
        (box_outside, "image i4: box lies outside of its film, which is 32 pixels wide and 40 high"),
        (box_without_area, "image i4: a box must have a positive width and height"),
        (two_patients_in_a_study, "rows 1 and 2: one study_id under two patients"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_does_not_fit_together_is_named(folder, change, message):
    change(folder)
    with pytest.raises(ManifestError) as caught:
        folder.read()
    assert message in str(caught.value)
    assert "P-A" not in str(caught.value)


def test_duplicate_study_and_unknown_class(folder):
    folder.read()
    path = folder.root / "train_study_level.csv"
    path.write_text(path.read_text() + "s1_study,0,1,0,0\n")
    with pytest.raises(ManifestError, match="id s1_study occurs twice"):
        read_siim(folder.root)
    lines = path.read_text().splitlines()[:-1]
    path.write_text("\n".join([lines[0] + ",Normal", *(line + ",0" for line in lines[1:])]))
    with pytest.raises(ManifestError, match=r"column 'Normal' is unknown.*Known: id, Negative for Pneumonia"):
        read_siim(folder.root)


def test_all_problems_come_in_one_error(folder):
    folder.images = [[f"x{i}_image", "", "none 1 0 0 1 1", "s0"] for i in range(30)]
    with pytest.raises(ManifestError) as caught:
        folder.read()
    assert isinstance(caught.value, CxrError)
    assert len(caught.value.problems) == 30 + 5 + 3  # rows without files, files without rows, studies without images
    assert str(caught.value).count("\n  - ") == 10 and "and 28 more" in str(caught.value)


def test_a_box_over_the_edge_is_cut_off_with_a_warning(folder):
    boxes = "[{'x': -0.4, 'y': 0, 'width': 8, 'height': 8}, {'x': 20, 'y': 30, 'width': 20, 'height': 20}]"
    folder.images[4][1:3] = boxes, "opacity 1 20 30 40 50 opacity 1 0 0 7.6 8"
    with pytest.warns(ManifestWarning, match="1 boxes reach over the edge.*image i4"):
        df = folder.read()
    assert row_mask(df.iloc[4], HEIGHT, WIDTH).sum() == 8 * 8 + 12 * 10


def test_links_that_lead_out(folder, tmp_path):
    """A data set from elsewhere must not make this machine's other files its films."""
    film = next(iter(sorted((folder.root / "train").rglob("*.dcm"))))
    film.rename(tmp_path / "elsewhere.dcm")
    film.symlink_to(tmp_path / "elsewhere.dcm")
    with pytest.raises(ManifestError, match=rf"{film.name} leads out of"):
        folder.read()
    (folder.root / "train").rename(tmp_path / "train")
    (folder.root / "train").symlink_to(tmp_path / "train")
    with pytest.raises(ManifestError, match="train/ leads out of it"):
        folder.read()


def test_generated_films_are_read_as_the_challenge_is(tmp_path):
    phantom = pytest.importorskip("cxr_tf.data.phantom")
    root = phantom.write_siim(tmp_path / "siim", studies=16, size=64, seed=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ManifestWarning)
        df = read_siim(root)
    assert df["study_id"].nunique() == 16 < len(df)
    assert df["patient_id"].nunique() < 16
    assert (labels(df).sum(axis=0) > 0).all()
    assert set(df["mask_known"]) == {True, False}
