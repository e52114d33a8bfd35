"""NIH's folder: its traps, the official lists, the boxes, and what does not fit together."""

from __future__ import annotations

import csv
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cxr_tf.data.manifest import ManifestError, ManifestWarning, class_names, fill_boxes, labels, row_mask
from cxr_tf.data.readers.nih import BOXED, FINDINGS, read_nih
from cxr_tf.data.split import carve, check_patients
from cxr_tf.errors import CxrError

HEADER_2017 = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y],"
)
BOX_HEADER = "Image Index,Finding Label,Bbox [x,y,w,h],,,"  # nine fields, of which the rows have six


class Folder:
    """A small data set that tests can spoil before they write it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.csv, self.header, self.end = "Data_Entry_2017.csv", HEADER_2017, "\n"
        self.box_header = BOX_HEADER
        self.rows = [
            ["00000001_000.png", "Cardiomegaly", "0", "1", "058Y", "M", "PA"],
            ["00000001_001.png", "Cardiomegaly|Emphysema", "1", "1", "058Y", "M", "PA"],
            ["00000002_000.png", "No Finding", "0", "2", "080Y", "M", "AP"],
            ["00000003_000.png", "Infiltration|Pneumonia", "0", "3", "81", "F", "PA"],
            ["00000004_000.png", "Infiltration|Pneumonia", "0", "4", "006M", "F", "AP"],
            ["00000005_000.png", "Pneumonia|Mass", "0", "5", "414", "F", "AP"],
        ]
        self.train = [row[0] for row in self.rows[:4]]
        self.test = [row[0] for row in self.rows[4:]]
        self.boxes = [
            ["00000001_000.png", "Cardiomegaly", "277.1", "459.2", "540.2", "301.6"],
            ["00000003_000.png", "Pneumonia", "100.5", "200", "300", "400.25"],
            ["00000003_000.png", "Infiltrate", "600", "200", "100", "100"],
            ["00000004_000.png", "Pneumonia", "100", "200", "300", "400"],  # whose infiltration nobody boxed
            ["00000005_000.png", "Mass", "10", "20", "30", "40"],
            ["00000005_000.png", "Pneumonia", "500", "600", "100", "50"],
        ]
        self.folders = ["images_001/images", "images_002/images"]
        for number, row in enumerate(self.rows):
            self.film(row[0], self.folders[number // 4])

    def film(self, name: str, folder: str = "images_001/images", size: tuple[int, int] = (1024, 1024)) -> Path:
        path = self.root / folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", size).save(path, format="PNG")
        return path

    def write(self, name: str, lines: list[str], start: str = "") -> None:
        (self.root / name).write_bytes((start + self.end.join(lines) + self.end).encode())

    def read(self, start: str = "", **options):
        comma = "," if self.header.endswith(",") else ""
        self.write(
            self.csv, [self.header, *(",".join([*row, "2682,2749,0.143,0.143"]) + comma for row in self.rows)], start
        )
        for name, films in (("train_val_list.txt", self.train), ("test_list.txt", self.test)):
            if films is not None:
                self.write(name, films, start)
        if self.boxes is not None:
            self.write("BBox_List_2017.csv", [self.box_header, *map(",".join, self.boxes)], start)
        return read_nih(self.root, **options)


@pytest.fixture
def folder(tmp_path) -> Folder:
    return Folder(tmp_path / "nih")


def sound(folder: Folder, **options):
    """Reads a folder in which all is well but the age of 414 years."""
    with pytest.warns(ManifestWarning) as caught:
        df = folder.read(**options)
    assert [str(w.message)[:6] for w in caught] == ["1 ages"], [str(w.message) for w in caught]
    return df


def refuse(folder: Folder, **options) -> str:
    with warnings.catch_warnings(), pytest.raises(ManifestError) as caught:
        warnings.simplefilter("ignore")
        folder.read(**options)
    assert isinstance(caught.value, CxrError)
    return str(caught.value)


# --- the real rows --------------------------------------------------------------------------------------------------


def test_the_real_rows(cxr_data, tmp_path):
    """Real rows, put back into the published layout, come out as the columns that they are kept in."""
    with (cxr_data / "metadata.csv").open(newline="") as file:
        kept = [row for row in csv.DictReader(file) if row["image"].startswith("images/nih/")]
    with (cxr_data / "boxes.csv").open(newline="") as file:
        stored = [row for row in csv.DictReader(file) if row["annotator"] == "nih"]
    films = {row["orig_name"]: row for row in kept}
    assert len(films) == len(kept) == 832
    (tmp_path / "images").mkdir()
    lines = [HEADER_2017.rstrip(",")]
    for number, (name, row) in enumerate(films.items()):
        (tmp_path / "images" / name).write_bytes((cxr_data / row["image"]).read_bytes())
        patient = int(row["patient_id"].removeprefix("nih_"))
        cells = [name, row["fine_label"], str(number), str(patient), row["age"], row["sex"], row["view"]]
        lines.append(",".join([*cells, "2500,2048,0.168,0.168"]))
    (tmp_path / "Data_Entry_2017_v2020.csv").write_text("\n".join(lines))
    for list_name, folds in (("train_val_list.txt", "012"), ("test_list.txt", "3")):
        (tmp_path / list_name).write_text("\n".join(name for name, row in films.items() if row["fold"] in folds))
    scale = 1024 / 512  # the kept boxes are in pixels of the kept, smaller films
    name_of = {row["image"]: row["orig_name"] for row in kept}
    boxes = [
        [name_of[b["image"]], b["label"], *(str(float(b[k]) * scale) for k in ("x", "y", "width", "height"))]
        for b in stored
        if b["image"] in name_of
    ]
    assert len(boxes) == len(stored)
    (tmp_path / "BBox_List_2017.csv").write_text("\n".join([BOX_HEADER, *map(",".join, boxes)]))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        df = read_nih(tmp_path)
    assert [Path(path).name for path in df["image"]] == list(films)
    assert [f"nih_{int(patient):08}" for patient in df["patient_id"]] == [row["patient_id"] for row in kept]
    assert list(df["view"]) == [row["view"] for row in kept] and list(df["sex"]) == [row["sex"] for row in kept]
    assert list(df["age"]) == [float(row["age"]) for row in kept]
    assert list(df["split"]) == ["test" if row["fold"] == "3" else "train" for row in kept]
    names = np.array([*class_names(df), "No Finding"])
    values = labels(df)
    values = np.column_stack([values, values.sum(axis=1) == 0]) == 1
    assert [set(names[row]) for row in values] == [set(row["fine_label"].split("|")) for row in kept]

    opacity = {"Pneumonia": "Pneumonia", "Infiltrate": "Infiltration"}
    masks = 0
    for (_, row), real in zip(df.iterrows(), kept, strict=True):
        drawn = [b for b in stored if b["image"] == real["image"] and b["label"] in opacity]
        expected = [[float(b[k]) for k in ("x", "y", "width", "height")] for b in drawn]
        np.testing.assert_allclose(np.reshape(row["boxes"], (-1, 4)), np.reshape(expected, (-1, 4)))
        boxed = {opacity[b["label"]] for b in drawn}
        assert row["mask_known"] == (
            bool(boxed) and set(real["fine_label"].split("|")) & set(opacity.values()) <= boxed
        )
        if real["opacity_mask_kind"] == "opacity_bbox_nih":  # the same boxes, filled by others
            mask = np.asarray(Image.open(cxr_data / real["opacity_mask"])) > 0
            ours = fill_boxes(row["boxes"], *mask.shape) > 0
            assert (mask & ours).sum() / (mask | ours).sum() > 0.97
            masks += 1
    assert masks == 24 and df["mask_known"].sum() == 27


# --- rows -----------------------------------------------------------------------------------------------------------


def test_rows_labels_patients_and_splits(folder):
    df = sound(folder)
    assert class_names(df) == list(FINDINGS) and len(FINDINGS) == 14
    named = [[c for c, value in zip(FINDINGS, row, strict=True) if value == 1] for row in labels(df)]
    assert [sorted(names) for names in named] == [
        ["Cardiomegaly"],
        ["Cardiomegaly", "Emphysema"],
        [],
        ["Infiltration", "Pneumonia"],
        ["Infiltration", "Pneumonia"],
        ["Mass", "Pneumonia"],
    ]
    assert not np.isnan(labels(df)).any()
    assert list(df["patient_id"]) == ["1", "1", "2", "3", "4", "5"]
    assert list(df["study_id"]) == ["1/0", "1/1", "2/0", "3/0", "4/0", "5/0"]
    assert list(df["split"]) == ["train"] * 4 + ["test"] * 2 and list(df["source"]) == ["nih"] * 6
    assert list(df["view"]) == ["PA", "PA", "AP", "PA", "AP", "AP"] and list(df["sex"]) == list("MMMFFF")
    np.testing.assert_allclose(df["age"], [58, 58, 80, 81, 0.5, np.nan])
    assert df["image"][0] == str(folder.root / "images_001" / "images" / "00000001_000.png")
    assert df["image"][5] == str(folder.root / "images_002" / "images" / "00000005_000.png")
    check_patients(carve(df, 0.5, seed=0, stratify=False))  # validation is taken from the official training list


def test_the_later_table_is_read_first(folder):
    sound(folder)
    folder.header = HEADER_2017.rstrip(",").replace("Gender", "Sex")
    folder.csv = "Data_Entry_2017_v2020.csv"
    folder.rows[5][4] = "50"
    folder.rows[2][1] = ""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        df = folder.read()
    assert df["age"][5] == 50 and list(df["sex"]) == list("MMMFFF")
    assert (
        np.isnan(labels(df)[2]).all() and not np.isnan(labels(df)[[0, 1, 3, 4, 5]]).any()
    )  # a blank is no "No Finding"


def test_findings_are_chosen(folder):
    df = sound(folder, findings=["Pneumonia", "Cardiomegaly"])
    assert class_names(df) == ["Pneumonia", "Cardiomegaly"]
    np.testing.assert_array_equal(labels(df), [[0, 1], [0, 1], [0, 0], [1, 0], [1, 0], [1, 0]])
    assert 'unknown name. Did you mean "Infiltration"?' in refuse(folder, findings=["Infiltrate"])
    assert "no name occurs twice" in refuse(folder, findings=["Mass", "Mass"])
    assert "no name occurs twice" in refuse(folder, findings="Mass")
    assert "Known: Atelectasis" in refuse(folder, mask_findings=["Hernia"])  # which has no boxes
    assert 'must be "error" or "skip". Received: \'ignore\'' in refuse(folder, missing="ignore")


@pytest.mark.parametrize("start", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_line_ends_and_byte_order_marks(folder, start, end):
    expected = sound(folder)
    folder.end = end
    pd.testing.assert_frame_equal(sound(folder, start=start), expected)


def test_quoted_cells(folder):
    expected = sound(folder)
    folder.header = folder.header.replace("OriginalImage[Width,Height]", '"OriginalImage[Width,Height]"')
    lines = [",".join(['"' + cell + '"' for cell in row] + ['"2682,2749"', "0.1,0.1"]) for row in folder.rows]
    folder.write(folder.csv, [folder.header, *lines])
    with pytest.warns(ManifestWarning, match="1 ages"):
        pd.testing.assert_frame_equal(read_nih(folder.root), expected)


def test_ages(folder):
    folder.rows[0][4], folder.rows[1][4], folder.rows[2][4], folder.rows[3][4] = "", "0", "121", "old"
    with pytest.warns(ManifestWarning, match=r"3 ages are no .* up to 120 .* the first is '121' in line 4"):
        df = folder.read()
    np.testing.assert_allclose(df["age"], [np.nan, 0, np.nan, np.nan, 0.5, np.nan])


@settings(max_examples=30, deadline=None)
@given(parts=st.lists(st.sets(st.sampled_from(FINDINGS)), min_size=1, max_size=6), order=st.randoms())
def test_labels_are_the_set_of_findings_whatever_their_order(tmp_path_factory, parts, order):
    root = tmp_path_factory.mktemp("nih")
    (root / "images").mkdir()
    lines = [HEADER_2017]
    for number, findings in enumerate(parts, start=1):
        name = f"{number:08}_000.png"
        (root / "images" / name).touch()
        joined = "|".join(order.sample(sorted(findings), len(findings))) or "No Finding"
        lines.append(f"{name},{joined},0,{number},30,M,PA,1,1,1,1,")
    (root / "Data_Entry_2017.csv").write_text("\n".join(lines))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        values = labels(read_nih(root))
    assert [set(np.array(FINDINGS)[row == 1]) for row in values] == parts


# --- boxes ----------------------------------------------------------------------------------------------------------


def test_masks_are_known_as_far_as_they_were_drawn(folder):
    df = sound(folder)
    assert df["boxes"][3] == [[100.5, 200.0, 300.0, 400.25], [600.0, 200.0, 100.0, 100.0]]
    assert df["boxes"][4] == [[100.0, 200.0, 300.0, 400.0]]
    assert df["boxes"][5] == [[500.0, 600.0, 100.0, 50.0]]  # the mass is no opacity of this kind
    assert df["boxes"][0] == df["boxes"][2] == []  # a heart is none at all, and "No Finding" is no annotation
    assert list(df["mask_known"]) == [False, False, False, True, False, True]
    assert row_mask(df.iloc[4], 1024, 1024) is None
    assert row_mask(df.iloc[3], 1024, 1024).sum() == 300 * 400 + 100 * 100


def test_other_findings_can_make_the_mask(folder):
    df = sound(folder, mask_findings=["Cardiomegaly", "Pneumonia"])
    assert df["boxes"][0] == [[277.1, 459.2, 540.2, 301.6]]
    assert list(df["mask_known"]) == [True, False, False, True, True, True]
    df = sound(folder, mask_findings=BOXED)
    assert [len(boxes) for boxes in df["boxes"]] == [1, 0, 0, 2, 1, 2]
    df = sound(folder, mask_findings=[])
    assert not df["mask_known"].any() and not any(df["boxes"])


def test_boxes_follow_films_that_were_resized(folder):
    folder.film("00000003_000.png", "images_001/images", size=(512, 256))
    df = sound(folder)
    assert df["boxes"][3] == [[50.25, 50.0, 150.0, 100.0625], [300.0, 50.0, 50.0, 25.0]]
    assert df["boxes"][5] == [[500.0, 600.0, 100.0, 50.0]]
    np.testing.assert_array_equal(row_mask(df.iloc[3], 256, 512), fill_boxes(df["boxes"][3], 256, 512))


def test_a_film_with_boxes_that_cannot_be_read_is_left_for_preparation_to_reject(folder):
    (folder.root / "images_001" / "images" / "00000003_000.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    assert sound(folder)["boxes"][3][0] == [100.5, 200.0, 300.0, 400.25]


def test_boxes_at_and_beyond_the_edge(folder):
    folder.boxes[1][2:] = ["900", "900", "200", "100"]
    with pytest.warns(ManifestWarning, match="1 boxes reach over the edge.*00000003_000"):
        folder.read()
    folder.boxes[1][2] = "1024"
    assert "BBox_List_2017.csv: 00000003_000.png: box lies outside of its film" in refuse(folder)


def test_without_a_box_list_no_mask_is_known(folder):
    folder.boxes = None
    with pytest.warns(ManifestWarning, match=r"no BBox_List_2017.csv: no film has a known mask"):
        df = folder.read()
    assert not df["mask_known"].any()
    sound(folder, mask_findings=[])  # who asks for none is told nothing


def test_boxes_of_films_without_a_row_are_counted(folder):
    folder.boxes.append(["00000009_000.png", "Mass", "1", "2", "3", "4"])
    with pytest.warns(ManifestWarning, match="has 1 boxes of films without a row, the first is of '00000009_000.png'"):
        folder.read()


def test_progress_counts_films_with_boxes(folder):
    calls = []
    sound(folder, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(1, 3), (2, 3), (3, 3)]


# --- files and lists ------------------------------------------------------------------------------------------------


def test_one_flat_folder(folder):
    expected = sound(folder).drop(columns="image")
    for part in folder.folders:
        for path in (folder.root / part).iterdir():
            (folder.root / "images").mkdir(exist_ok=True)
            path.rename(folder.root / "images" / path.name)
        (folder.root / part).rmdir()
    df = sound(folder)
    pd.testing.assert_frame_equal(df.drop(columns="image"), expected)
    assert df["image"][0] == str(folder.root / "images" / "00000001_000.png")


def test_one_missing_film_is_named(folder):
    (folder.root / "images_001" / "images" / "00000002_000.png").unlink()
    text = refuse(folder)
    assert "line 4: there is no file 00000002_000.png in images_001/images/ to images_002/images/" in text
    assert 'missing="skip"' in text and "problems" not in text


def test_a_partial_download_is_read_with_a_count(folder):
    for path in (folder.root / "images_002" / "images").iterdir():
        path.unlink()
    with pytest.warns(ManifestWarning) as caught:
        df = folder.read(missing="skip")
    assert any(
        "2 of 6 films have no file and are left out, the first is 00000004_000.png" in str(w.message) for w in caught
    )
    assert list(df["patient_id"]) == ["1", "1", "2", "3"] and list(df.index) == [0, 1, 2, 3]
    assert list(df["mask_known"]) == [False, False, False, True] and len(df["boxes"][3]) == 2
    text = refuse(folder)
    assert "2 problems" in text and text.count('missing="skip"') == 1
    for path in (folder.root / "images_001" / "images").iterdir():
        path.unlink()
    assert "none of the 6 films of Data_Entry_2017.csv is there" in refuse(folder, missing="skip")


def test_files_without_a_row_are_counted(folder):
    folder.film("00000099_000.png")
    folder.film("._00000001_000.png")  # what an archive from a Mac leaves
    with pytest.warns(ManifestWarning, match=r"names 1 files, which are not read; the first is 00000099_000.png"):
        assert len(folder.read()) == 6


def test_links_and_names_do_not_lead_out(folder, tmp_path):
    outside = folder.film("outside.png", "..")
    film = folder.root / "images_001" / "images" / "00000002_000.png"
    film.unlink()
    film.symlink_to(outside)
    assert "images_001/images/00000002_000.png leads out of" in refuse(folder)
    film.unlink()
    film.symlink_to(folder.film("elsewhere.png", "inside"))
    assert len(sound(folder)) == 6  # out of the folder of images, but not of the data set
    for name in ("../outside.png", str(outside), "images/00000002_000.png", "..", ""):
        folder.rows[2][0] = name
        text = refuse(folder, missing="skip")
        assert f"line 4: Image Index must be a file's name, without folders. Received: {name!r}" in text
    (tmp_path / "aside").mkdir()
    (folder.root / "images_002").rename(tmp_path / "aside" / "images_002")
    (folder.root / "images_002").symlink_to(tmp_path / "aside" / "images_002")
    assert "images_002/images/ leads out of" in refuse(folder)
    (tmp_path / "linked").symlink_to(folder.root)  # a root that is a link itself is as good as any
    with pytest.raises(ManifestError, match="images_002/images/ leads out of"):
        read_nih(tmp_path / "linked")


def test_no_lists_no_splits(folder):
    folder.train = folder.test = None
    with pytest.warns(ManifestWarning, match="no train_val_list.txt and no test_list.txt: no film has a split"):
        df = folder.read()
    assert list(df["split"]) == [None] * 6
    folder.test = [folder.rows[0][0]]
    assert "there is test_list.txt, but no train_val_list.txt" in refuse(folder)


def test_films_in_no_list_and_lists_of_other_films(folder):
    folder.train[2:3] = ["", "00000098_000.png"]
    with pytest.warns(ManifestWarning) as caught:
        df = folder.read()
    texts = "\n".join(str(w.message) for w in caught)
    assert "1 films are in neither train_val_list.txt nor test_list.txt" in texts and "is 00000002_000.png" in texts
    assert "name 1 films without a row, the first is 00000098_000.png" in texts
    assert list(df["split"]) == ["train", "train", None, "train", "test", "test"]


def test_a_folder_of_another_kind_is_told_what_it_should_hold(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    for wrong in (tmp_path / "empty", tmp_path / "nowhere", folder.root / "images_001" / "images"):
        with pytest.raises(ManifestError, match=r"no images/ and no images_001/images/ in it. An NIH ChestX-ray14"):
            read_nih(wrong)
    (tmp_path / "empty" / "images_01.tar.gz").touch()
    (tmp_path / "empty" / "images_001.tar.gz").touch()
    with pytest.raises(ManifestError, match=r"Unpack images_001.tar.gz"):
        read_nih(tmp_path / "empty")
    with pytest.raises(ManifestError, match=r"no Data_Entry_2017.csv and no Data_Entry_2017_v2020.csv in it"):
        read_nih(folder.root)


# --- what does not fit together -------------------------------------------------------------------------------------


def missing_column(folder):
    folder.header = folder.header.replace("Finding Labels", "Finding Lables")


def missing_sex(folder):
    folder.header = folder.header.replace("Patient Gender", "Patient Gendre")


def repeated_column(folder):
    folder.header = folder.header.replace("Patient Age", "Patient ID")


def short_row(folder):
    folder.rows[1] = folder.rows[1][:5]


def not_csv(folder):
    folder.rows[1][1] = '"Mass'


def duplicate_film(folder):
    folder.rows.append(folder.rows[0])


def unknown_finding(folder):
    folder.rows[0][1] = folder.rows[2][1] = "Mass|Infiltrations"


def no_finding_and_one(folder):
    folder.rows[0][1] = "Mass|No Finding"


def patient_not_a_number(folder):
    folder.rows[0][3] = "Secret"


def patient_not_in_the_name(folder):
    folder.rows[0][3] = "77777"


def film_twice(folder):
    folder.film("00000001_000.png", "images_002/images")


def listed_twice(folder):
    folder.train.append(folder.train[0])


def in_both_lists(folder):
    folder.train.append("00000005_000.png")


def patient_on_both_sides(folder):
    folder.train.remove("00000001_001.png")
    folder.test.append("00000001_001.png")


def unknown_box(folder):
    folder.boxes[0][1] = "Cardiomegally"


def box_not_read(folder):
    folder.boxes[0][2] = "wide"


def box_infinite(folder):
    folder.boxes[0][4] = "inf"


def box_without_area(folder):
    folder.boxes[0][5] = "0"


def box_twice(folder):
    folder.boxes.append(folder.boxes[0])


def box_column(folder):
    folder.box_header = folder.box_header.replace("Finding Label", "Finding Labels")


def box_row_too_long(folder):
    folder.boxes[0] = [*folder.boxes[0], "", "", "", "7"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (missing_column, "column 'Finding Labels' is missing. Did you mean \"Finding Lables\"?"),
        (missing_sex, "column 'Patient Gender' (or 'Patient Sex') is missing. Did you mean \"Patient Gendre\"?"),
        (repeated_column, "column 'Patient ID' occurs twice"),
        (short_row, "line 3: 10 fields, but the first has 11"),
        (not_csv, "not CSV"),
        (duplicate_film, "line 8: film 00000001_000.png is listed twice, first in line 2"),
        (unknown_finding, '2 rows have an unknown finding. Did you mean "Infiltration"?'),
        (no_finding_and_one, "1 rows have 'No Finding' beside a finding. Received: 'Mass|No Finding'"),
        (patient_not_a_number, "line 2: Patient ID must be a whole number. Received: other text"),
        (patient_not_in_the_name, "line 2: the Patient ID is not the one in the film's name, 00000001_000.png"),
        (film_twice, "film 00000001_000.png has two files"),
        (listed_twice, "train_val_list.txt: line 5: film 00000001_000.png is listed twice, first in line 1"),
        (in_both_lists, "film 00000005_000.png is in train_val_list.txt and in test_list.txt"),
        (
            patient_on_both_sides,
            "film 00000001_000.png in train_val_list.txt and film 00000001_001.png in test_list.txt are of one patient",
        ),
        (unknown_box, 'BBox_List_2017.csv: line 2: unknown finding. Did you mean "Cardiomegaly"?'),
        (box_not_read, "line 2: x, y, w and h must be numbers, the last two above 0. Received: ['wide'"),
        (box_infinite, "line 2: x, y, w and h must be numbers"),
        (box_without_area, "line 2: x, y, w and h must be numbers, the last two above 0"),
        (box_twice, "BBox_List_2017.csv: line 8: repeats line 2"),
        (box_column, "BBox_List_2017.csv: column 'Finding Label' is missing. Did you mean \"Finding Labels\"?"),
        (box_row_too_long, "line 2: 10 fields, but the first has 6"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_does_not_fit_together_is_named(folder, change, message):
    change(folder)
    text = refuse(folder)
    assert message in text
    assert "Secret" not in text and "77777" not in text
    assert text.count("\n") == 0 or "problems." in text


def test_all_problems_come_in_one_error(folder):
    folder.rows += [[f"{i:08}_000.png", "Mass", "0", str(i), "30", "M", "PA"] for i in range(100, 130)]
    folder.rows[0][1] = "Masss"
    with warnings.catch_warnings(), pytest.raises(ManifestError) as caught:
        warnings.simplefilter("ignore")
        folder.read()
    assert len(caught.value.problems) == 31
    assert str(caught.value).count("\n  - ") == 10 and "and 21 more" in str(caught.value)


@pytest.mark.parametrize("file", ["Data_Entry_2017.csv", "train_val_list.txt", "BBox_List_2017.csv"])
def test_other_encodings_and_empty_files(folder, file):
    sound(folder)
    (folder.root / file).write_bytes(b"Image Index,\xff\xfe\n")
    with warnings.catch_warnings(), pytest.raises(ManifestError, match=f"{file}.*must be UTF-8"):
        warnings.simplefilter("ignore")
        read_nih(folder.root)
    (folder.root / file).write_bytes(b"")
    if file != "train_val_list.txt":
        with warnings.catch_warnings(), pytest.raises(ManifestError, match=f"{file}: the first line must name the col"):
            warnings.simplefilter("ignore")
            read_nih(folder.root)


def test_as_many_rows_as_there_are_take_seconds(tmp_path):
    """All 112,120 rows, of which the files of 1,000 are there."""
    lines, first, second = [HEADER_2017], [], []
    for number in range(112_120):
        patient = number // 4 + 1
        name = f"{patient:08}_{number % 4:03}.png"
        lines.append(f"{name},Mass|Nodule,{number % 4},{patient},058Y,M,PA,2682,2749,0.143,0.143,")
        (second if patient % 5 == 0 else first).append(name)
    (tmp_path / "images_001" / "images").mkdir(parents=True)
    for name in first[:1000]:
        (tmp_path / "images_001" / "images" / name).touch()
    (tmp_path / "Data_Entry_2017.csv").write_text("\n".join(lines))
    (tmp_path / "train_val_list.txt").write_text("\n".join(first))
    (tmp_path / "test_list.txt").write_text("\n".join(second))
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert len(read_nih(tmp_path, missing="skip")) == 1000
    assert time.perf_counter() - start < 30  # about 3 on a quiet core
