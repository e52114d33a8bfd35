"""The challenge's folder of 2018: its traps, and what does not fit together."""

from __future__ import annotations

import csv
import os
import warnings
from pathlib import Path

import numpy as np
import pydicom
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from cxr_tf.data.manifest import ManifestError, ManifestWarning, class_names, labels, row_mask
from cxr_tf.data.readers.rsna import CLASSES, read_rsna
from cxr_tf.errors import CxrError

NORMAL, OTHER, OPACITY = CLASSES
LABELS, INFO = "stage_2_train_labels.csv", "stage_2_detailed_class_info.csv"
TRAIN, TEST = "stage_2_train_images", "stage_2_test_images"
HEIGHT, WIDTH = 40, 32


def write_film(path: Path, patient: str | None = None, **header) -> Path:
    film = Dataset()
    film.file_meta = FileMetaDataset()
    film.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    film.file_meta.MediaStorageSOPClassUID = film.SOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
    film.file_meta.MediaStorageSOPInstanceUID = film.SOPInstanceUID = generate_uid()
    film.PatientName = film.PatientID = path.stem if patient is None else patient
    film.Rows, film.Columns = HEIGHT, WIDTH
    film.SamplesPerPixel, film.PhotometricInterpretation = 1, "MONOCHROME2"
    film.BitsAllocated, film.BitsStored, film.HighBit, film.PixelRepresentation = 8, 8, 7, 0
    film.PixelData = bytes(HEIGHT * WIDTH)
    for name, value in header.items():
        setattr(film, name, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    pydicom.dcmwrite(path, film, enforce_file_format=True)
    return path


class Folder:
    """A small challenge folder that tests can spoil before they write it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.header, self.info_header = ["patientId", "x", "y", "width", "height", "Target"], ["patientId", "class"]
        self.rows = [
            ["n0", "", "", "", "", "0"],
            ["p1", "2.5", "4.0", "10.0", "20.25", "1"],
            ["p1", "20", "1", "5", "6", "1"],
            ["o2", "", "", "", "", "0"],
            ["p3", "0.0", "0.0", "8.0", "8.0", "1"],
        ]
        self.info = [["n0", NORMAL], ["p1", OPACITY], ["p1", OPACITY], ["o2", OTHER], ["p3", OPACITY]]
        for name in ("n0", "p1", "o2", "p3"):
            self.film(name)

    def film(self, name: str, folder: str = TRAIN, **header) -> Path:
        return write_film(self.root / folder / f"{name}.dcm", **header)

    def read(self, **options):
        self.write(LABELS, [self.header, *self.rows])
        self.write(INFO, [self.info_header, *self.info])
        return read_rsna(self.root, **options)

    def write(self, name: str, rows: list[list]) -> None:
        with (self.root / name).open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)


@pytest.fixture
def folder(tmp_path) -> Folder:
    return Folder(tmp_path / "rsna")


def message(call) -> str:
    with pytest.raises(ManifestError) as caught:
        call()
    assert isinstance(caught.value, CxrError)
    return str(caught.value)


@pytest.mark.filterwarnings("ignore:Invalid value for VR AS")  # "58": the published files say it so
def test_rows_classes_boxes_and_headers(folder):
    uid = generate_uid()
    folder.film("p1", ViewPosition="AP", PatientSex="F", PatientAge="58", StudyInstanceUID=uid)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        df = folder.read()
    assert class_names(df) == list(CLASSES)
    np.testing.assert_array_equal(labels(df), np.float32([[1, 0, 0], [0, 0, 1], [0, 1, 0], [0, 0, 1]]))
    assert list(df["patient_id"]) == ["n0", "p1", "o2", "p3"] and list(df["study_id"]) == ["n0", uid, "o2", "p3"]
    assert list(df["image"]) == [str(folder.root / TRAIN / f"{name}.dcm") for name in ("n0", "p1", "o2", "p3")]
    assert list(df["source"]) == ["rsna"] * 4 and list(df["split"]) == [None] * 4
    assert df["boxes"][1] == [[2.5, 4.0, 10.0, 20.25], [20.0, 1.0, 5.0, 6.0]]
    assert (df["view"][1], df["sex"][1], df["age"][1]) == ("AP", "F", 58.0)
    assert df["view"][0] is None and df["sex"][0] is None and np.isnan(df["age"][0])
    # A negative film, of either class, was looked at: its mask is known, and empty.
    assert list(df["mask_known"]) == [True] * 4
    assert [row_mask(df.iloc[i], HEIGHT, WIDTH).sum() for i in range(4)] == [0, 10 * 20 + 5 * 6, 0, 64]


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(order=st.permutations(range(5)), info_order=st.permutations(range(5)), repeats=st.integers(0, 2))
def test_the_order_and_repetition_of_rows_says_nothing(folder, order, info_order, repeats):
    expected = Folder(folder.root).read().set_index("patient_id")
    shuffled = Folder(folder.root)
    shuffled.rows = [shuffled.rows[i] for i in order]
    shuffled.info = [shuffled.info[i] for i in info_order] + [shuffled.info[1]] * repeats
    df = shuffled.read().set_index("patient_id")
    assert set(df.index) == set(expected.index)
    for name, row in expected.iterrows():
        np.testing.assert_array_equal(labels(df.loc[[name]]), labels(expected.loc[[name]]))
        assert sorted(df.loc[name, "boxes"]) == sorted(row["boxes"])


def test_files_as_spreadsheets_write_them(folder):
    df = folder.read()
    for name in (LABELS, INFO):
        lines = (folder.root / name).read_text().splitlines()
        quoted = [",".join(f'"{cell}"' for cell in line.split(",")) for line in lines]
        (folder.root / name).write_bytes(b"\xef\xbb\xbf" + "\r\n".join([*quoted, "", ""]).encode())
    again = read_rsna(folder.root)
    assert df.equals(again)


def test_the_test_half_has_no_labels(folder, tmp_path):
    folder.film("t1", TEST, ViewPosition="PA")
    folder.film("t0", TEST)
    df = folder.read(split="test")
    assert list(df["split"]) == ["test"] * 2 and list(df["patient_id"]) == ["t0", "t1"] and df["view"][1] == "PA"
    assert class_names(df) == list(CLASSES) and np.isnan(labels(df)).all() and not df["mask_known"].any()
    for name in (LABELS, INFO):
        (folder.root / name).unlink()
    assert len(read_rsna(folder.root, split="test")) == 2  # it needs no CSV
    assert 'must be "train" or "test". Received: \'valid\'' in message(lambda: folder.read(split="valid"))


def test_progress_reaches_the_end(folder):
    calls = []
    folder.read(progress=lambda done, total: calls.append((done, total)))
    assert calls == [(i, 4) for i in range(1, 5)]


def test_a_header_that_cannot_be_read_stays(folder):
    path = folder.film("p1")
    path.write_bytes(path.read_bytes()[:150])  # half a download
    (folder.root / TRAIN / "o2.dcm").write_bytes(b"")
    with pytest.warns(ManifestWarning, match=r"2 of 4 files have no header that can be read, the first is p1\.dcm"):
        df = folder.read()
    assert list(df["study_id"]) == ["n0", "p1", "o2", "p3"] and df["mask_known"].all()


def test_a_renamed_file_is_told(folder):
    folder.film("p1", patient="Secret-7")
    folder.film("o2", patient="")  # removed by whoever made it anonymous once more
    with pytest.warns(ManifestWarning, match=r"1 of 4 files have a PatientID that is not.*first is p1\.dcm") as caught:
        df = folder.read()
    assert list(df["patient_id"]) == ["n0", "p1", "o2", "p3"]
    assert "Secret-7" not in str(caught[0].message)


def test_a_box_over_the_edge_is_cut_off_with_a_warning(folder):
    folder.rows[4][1:5] = ["20", "30", "20", "20"]
    with pytest.warns(ManifestWarning, match="1 boxes reach over the edge.*image p3"):
        df = folder.read()
    assert row_mask(df.iloc[3], HEIGHT, WIDTH).sum() == 12 * 10


# --- layout ---------------------------------------------------------------------------------------------------------


def test_a_folder_of_another_kind_is_told_what_it_should_hold(folder, tmp_path):
    folder.read()
    for name in (LABELS, INFO):
        (folder.root / name).rename(tmp_path / "aside")
        text = message(lambda: read_rsna(folder.root))
        assert f"there is no {name} in it. An RSNA Pneumonia folder holds {LABELS}" in text
        (folder.root / f"{name}.zip").touch()
        assert f"there is no {name} in it. Unpack {name}.zip first." in message(lambda: read_rsna(folder.root))
        (tmp_path / "aside").rename(folder.root / name)
    (tmp_path / "empty").mkdir()
    for wrong in (tmp_path / "empty", tmp_path / "nowhere", folder.root / TRAIN, folder.root / LABELS):
        assert f"no folder '{TRAIN}' in it. An RSNA" in message(lambda wrong=wrong: read_rsna(wrong))
    (tmp_path / "empty" / TRAIN).mkdir()
    assert f"there is no {TRAIN}/<patientId>.dcm in it." in message(lambda: read_rsna(tmp_path / "empty"))
    (tmp_path / "empty" / f"{TEST}.zip").touch()
    assert f"Unpack {TEST}.zip first." in message(lambda: read_rsna(tmp_path / "empty", split="test"))


def test_films_under_another_name_are_found_out(folder):
    folder.read()
    (folder.root / TRAIN).rename(folder.root / "train")
    (folder.root / "notes").mkdir()
    text = message(lambda: read_rsna(folder.root))
    assert f"There are .dcm files in 'train': rename it to '{TRAIN}' if it is that." in text and "notes" not in text


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="needs a user whom permissions bind")
def test_a_folder_that_may_not_be_listed(folder):
    folder.read()
    (folder.root / TRAIN).chmod(0o000)
    try:
        assert "cannot be listed: Permission denied" in message(lambda: read_rsna(folder.root))
    finally:
        (folder.root / TRAIN).chmod(0o755)


def test_links_stay_inside_the_root(folder, tmp_path):
    outside = write_film(tmp_path / "elsewhere" / "p1.dcm")
    (folder.root / "kept").mkdir()
    (folder.root / TRAIN / "p3.dcm").rename(folder.root / "kept" / "p3.dcm")
    (folder.root / TRAIN / "p3.dcm").symlink_to(folder.root / "kept" / "p3.dcm")
    assert len(folder.read()) == 4  # within the root links are as good as files
    (tmp_path / "linked").symlink_to(folder.root)
    assert read_rsna(tmp_path / "linked")["image"][0].startswith(str(tmp_path / "linked"))
    (folder.root / TRAIN / "p1.dcm").unlink()
    (folder.root / TRAIN / "p1.dcm").symlink_to(outside)
    assert f"{TRAIN}/p1.dcm leads out of {folder.root}" in message(folder.read)
    (folder.root / TRAIN / "p1.dcm").unlink()
    (folder.root / TRAIN / "p1.dcm").symlink_to(folder.root / "gone.dcm")
    assert f"{TRAIN}/p1.dcm is no file" in message(folder.read)
    (folder.root / TRAIN).rename(tmp_path / "moved")
    (folder.root / TRAIN).symlink_to(tmp_path / "moved")
    assert f"{TRAIN} leads out of it; name the folder that it leads into" in message(folder.read)


@pytest.mark.parametrize("name", ["../elsewhere/p9", "/etc/p9", "sub/../p3", "p9\0"])
def test_an_id_is_a_file_name_and_no_path(folder, tmp_path, name):
    write_film(tmp_path / "elsewhere" / "p9.dcm")
    (folder.root / TRAIN / "sub").mkdir()
    folder.rows.append([name, "", "", "", "", "0"])
    folder.info.append([name, NORMAL])
    assert "there is no file" in message(folder.read)


# --- what does not fit together -------------------------------------------------------------------------------------


def misspelled_column(folder):
    folder.header[3] = "widht"


def missing_info_column(folder):
    folder.info_header[1] = "Class"


def box_with_target_0(folder):
    folder.rows[4][5] = "0"


def blank_with_target_1(folder):
    folder.rows[0][5] = "1"


def half_a_box(folder):
    folder.rows[4][3] = ""


def box_of_words(folder):
    folder.rows[4][3] = "wide"


def box_not_finite(folder):
    folder.rows[4][1] = "nan"


def box_without_area(folder):
    folder.rows[4][4] = "0"


def box_outside(folder):
    folder.rows[4][1] = "400"


def strange_target(folder):
    folder.rows[3][5] = "2"


def two_targets(folder):
    folder.rows[2][1:] = ["", "", "", "", "0"]


def box_twice(folder):
    folder.rows.append(list(folder.rows[1]))


def negative_twice(folder):
    folder.rows.append(list(folder.rows[0]))


def class_against_target(folder):
    folder.info[4][1] = OTHER


def target_against_class(folder):
    folder.info[3][1] = OPACITY


def two_classes(folder):
    folder.info[2][1] = NORMAL


def strange_class(folder):
    folder.info[0][1] = "normal"


def no_class(folder):
    del folder.info[0]


def class_alone(folder):
    folder.info.append(["n9", NORMAL])


def blank_id(folder):
    folder.rows[0][0] = ""


def row_without_file(folder):
    (folder.root / TRAIN / "o2.dcm").unlink()


def file_without_row(folder):
    folder.film("n9")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (misspelled_column, f"{LABELS}: column 'width' is missing. Did you mean \"widht\"?"),
        (missing_info_column, f"{INFO}: column 'class' is missing. Did you mean \"Class\"?"),
        (box_with_target_0, f"{LABELS}: line 6, image p3: has a box, but its Target is 0"),
        (blank_with_target_1, f"{LABELS}: line 2, image n0: Target is 1, but its box is blank"),
        (
            half_a_box,
            "line 6, image p3: x, y, width and height must be numbers, the last two above 0. Received: ['0.0'",
        ),
        (box_of_words, "line 6, image p3: x, y, width and height must be numbers"),
        (box_not_finite, "line 6, image p3: x, y, width and height must be numbers"),
        (box_without_area, "line 6, image p3: x, y, width and height must be numbers"),
        (box_outside, "image p3: box lies outside of its film, which is 32 pixels wide and 40 high"),
        (strange_target, "line 5, image o2: Target must be 0 or 1. Received: '2'"),
        (two_targets, "line 4, image p1: Target is 0, but 1 in an earlier row of that film"),
        (box_twice, "line 7, image p1: repeats line 3"),
        (negative_twice, "line 7, image n0: repeats line 2"),
        (class_against_target, f"image p3: Target is 1 in {LABELS}, but its class is '{OTHER}' in {INFO}"),
        (target_against_class, f"image o2: Target is 0 in {LABELS}, but its class is '{OPACITY}' in {INFO}"),
        (two_classes, f"{INFO}: line 4, image p1: '{NORMAL}', but '{OPACITY}' in an earlier row"),
        (
            strange_class,
            f"{INFO}: line 2, image n0: the class is unknown. Did you mean \"{NORMAL}\"? Known: '{NORMAL}'",
        ),
        (no_class, f"{LABELS}: image n0 is not in {INFO}"),
        (class_alone, f"{INFO}: image n9 is not in {LABELS}"),
        (blank_id, f"{LABELS}: line 2: patientId is blank"),
        (row_without_file, f"{LABELS}: image o2: there is no file {TRAIN}/o2.dcm"),
        (file_without_row, f"{LABELS}: no row names the file {TRAIN}/n9.dcm"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_does_not_fit_together_is_named(folder, change, expected):
    change(folder)
    assert expected in message(folder.read)


def test_half_a_download_is_one_error(folder):
    for number in range(30):
        folder.rows.append([f"x{number}", "", "", "", "", "0"])
        folder.info.append([f"x{number}", NORMAL])
    with pytest.raises(ManifestError) as caught:
        folder.read()
    assert len(caught.value.problems) == 30
    assert str(caught.value).count("\n  - ") == 10 and "and 20 more" in str(caught.value)


def test_a_label_file_without_rows(folder):
    folder.rows = []
    assert "no row names the file" in message(folder.read)
