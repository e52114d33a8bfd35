"""Any CSV as a manifest: columns mapped, labels of three kinds, masks, and what is refused."""

from __future__ import annotations

import csv
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cxr_tf.data.manifest import ManifestError, ManifestWarning, class_names, labels, row_mask
from cxr_tf.data.readers.table import read_table
from cxr_tf.data.split import split_by_column

SIZE = (12, 10)  # height, width


@pytest.fixture
def root(tmp_path) -> Path:
    folder = tmp_path / "set"
    (folder / "images").mkdir(parents=True)
    for name in "abcdef":
        Image.fromarray(np.zeros(SIZE, np.uint8)).save(folder / "images" / f"{name}.png")
    (folder / "masks").mkdir()
    mask = np.zeros(SIZE, np.uint8)
    mask[2:5, 3:5] = 255
    Image.fromarray(mask).save(folder / "masks" / "a.png")
    Image.fromarray(mask.T).save(folder / "masks" / "turned.png")
    return folder


def write(root: Path, rows: list[dict], name: str = "films.csv") -> Path:
    """A CSV of `rows`; image and patient_id are a.png, b.png, ... and p0, p1, ... where a row has none."""
    rows = [{"image": f"images/{'abcdef'[i]}.png", "patient_id": f"p{i}"} | row for i, row in enumerate(rows)]
    with (root / name).open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)), restval="")
        writer.writeheader()
        writer.writerows(rows)
    return root / name


def refuse(root: Path, rows: list[dict], **options) -> str:
    with pytest.raises(ManifestError) as caught:
        read_table(write(root, rows), **options)
    return str(caught.value)


# --- the real set ---------------------------------------------------------------------------------------------------


def test_the_real_set(cxr_data):
    with pytest.warns(ManifestWarning, match="10 films have a mask or boxes though 'opacity_negative' is 1"):
        df = read_table(
            cxr_data / "metadata.csv",
            view="view",
            sex="sex",
            age="age",
            source="source_repo",
            label="finding",
            classes={"No finding": ["No finding"], "Pneumonia": ["Pneumonia (unspecified)"]},
            mask="opacity_mask",
            mask_where={"opacity_mask_kind": ["opacity_bbox_rsna", "opacity_bbox_nih"]},
            mask_empty="opacity_negative",
            keep=["fold", "finding"],
            where={"source_repo": ["muhammedtalo/COVID-19 (NIH ChestX-ray14)"]},
        )
    rows = [
        r for r in csv.DictReader((cxr_data / "metadata.csv").open(newline="")) if r["image"].startswith("images/nih")
    ]
    assert len(df) == len(rows) == 832  # of the set's 994 NIH films, those of folds 0 to 3
    assert class_names(df) == ["No finding", "Pneumonia"]
    assert labels(df).sum(axis=0).tolist() == [412, 420]
    assert list(df["fold"]) == [row["fold"] for row in rows] and list(df["finding"]) == [row["finding"] for row in rows]
    assert list(df["patient_id"]) == [row["patient_id"] for row in rows]
    assert list(df["image"]) == [str(cxr_data / row["image"]) for row in rows]
    assert df["mask"].notna().sum() == sum(row["opacity_mask"] != "" for row in rows) == 126
    assert df["mask_known"].sum() == sum(r["opacity_mask"] != "" or r["opacity_negative"] == "1" for r in rows) == 292
    assert set(df["view"]) == {"PA", "AP"} and set(df["sex"]) == {"M", "F"} and df["age"].between(1, 95).all()
    sums = [row_mask(row, 512, 512).sum() for _, row in df[df["mask_known"]].iterrows()]
    assert sum(total > 0 for total in sums) == 126 and sums.count(0) == 292 - 126
    parts = split_by_column(df, "fold", {"train": [0, 1, 2], "test": [3]})["split"]
    assert parts.value_counts().to_dict() == {"train": 629, "test": 203}


# --- columns --------------------------------------------------------------------------------------------------------


def test_only_images_and_patients_are_needed(root):
    df = read_table(write(root, [{}, {"patient_id": "p0"}]))
    assert list(df["image"]) == [str(root / "images" / "a.png"), str(root / "images" / "b.png")]
    assert list(df["patient_id"]) == ["p0", "p0"] and df["study_id"].nunique() == 2
    assert set(df["source"]) == {"set"} and class_names(df) == [] and not df["mask_known"].any()


def test_columns_are_mapped(root):
    rows = [
        {"who": "1", "exam": "1", "from": "X", "pos": "pa", "s": "m", "years": "058Y", "fold": "0", "note": "a, b"},
        {"who": "2", "exam": "1", "from": "", "pos": "", "s": "Female", "years": "6.5", "fold": "1"},
        {"who": "2", "exam": "1", "from": "Y", "pos": "LL", "s": "O", "years": "006M", "fold": "1"},
        {"who": "2", "exam": "2", "from": "Y", "pos": "AP", "s": "", "years": "1-5 (cohort)", "fold": "1"},
    ]
    mapped = {"patient": "who", "study": "exam", "source": "from", "view": "pos", "sex": "s", "age": "years"}
    df = read_table(write(root, rows), **mapped, keep=["fold", "note"])
    assert list(df["patient_id"]) == ["1", "2", "2", "2"]
    assert df["study_id"].nunique() == 3 and df["study_id"][1] == df["study_id"][2]  # "1" of patient 1 is another
    assert list(df["source"]) == ["X", "set", "Y", "Y"]
    assert list(df["view"]) == ["PA", None, "LL", "AP"] and list(df["sex"]) == ["M", "F", None, None]
    np.testing.assert_allclose(df["age"], [58, 6.5, 0.5, np.nan])
    assert list(df["fold"]) == ["0", "1", "1", "1"] and list(df["note"]) == ["a, b", None, None, None]


def test_each_film_its_own_patient_if_one_says_so(root):
    df = read_table(write(root, [{}, {}]), patient="image")
    assert list(df["patient_id"]) == ["images/a.png", "images/b.png"]
    assert "line 3: column 'patient_id' is blank" in refuse(root, [{}, {"patient_id": " "}])


def test_where_leaves_rows_out_before_anything_else_is_looked_at(root):
    rows = [{"site": "here"}, {"site": "there", "image": "images/gone.png", "patient_id": ""}]
    df = read_table(write(root, rows), where={"site": ["here"]})
    assert len(df) == 1
    assert "no row has 'hre' in column 'site'. Did you mean \"here\"?" in refuse(root, rows, where={"site": ["hre"]})


def test_missing_columns_are_named_with_the_nearest(root):
    text = refuse(root, [{"Age": "3"}], age="age", label="finding", classes=["A"], keep=["fold"])
    assert (
        "there is no column 'age' for `age`" in text and "'finding' for `label`" in text and "'fold' for `keep`" in text
    )
    assert "films.csv (columns: image, patient_id, Age): 3 problems" in text
    assert 'Did you mean "patient_id"?' in refuse(root, [{}], patient="patientid")
    assert "manifest has a column of that name" in refuse(root, [{"view": "PA"}], keep=["view"])
    assert "cannot read it: No such file" in _message(lambda: read_table(root / "nowhere.csv"))
    (root / "films.csv").write_text("image,patient_id\n")
    assert "it has no row." in _message(lambda: read_table(root / "films.csv"))


def _message(call) -> str:
    with pytest.raises(ManifestError) as caught:
        call()
    return str(caught.value)


# --- labels ---------------------------------------------------------------------------------------------------------


def test_one_class_a_film(root):
    rows = [{"finding": "pna"}, {"finding": "clear"}, {"finding": ""}, {"finding": "pneumonia"}, {"finding": "unsure"}]
    classes = {"Normal": ["clear"], "Pneumonia": ["pna", "pneumonia"]}
    df = read_table(write(root, rows), label="finding", classes=classes, ignore=["unsure"])
    nan = np.nan
    np.testing.assert_array_equal(labels(df), np.float32([[0, 1], [1, 0], [nan, nan], [0, 1], [nan, nan]]))
    df = read_table(write(root, rows[1:3]), label="finding", classes=["other", "clear"])
    np.testing.assert_array_equal(labels(df), np.float32([[0, 1], [nan, nan]]))


def test_several_classes_joined(root):
    rows = [{"f": "Mass|Effusion"}, {"f": "No Finding"}, {"f": ""}, {"f": "Effusion| Hernia"}]
    options = {"label": "f", "classes": ["Effusion", "Mass"], "label_separator": "|"}
    df = read_table(write(root, rows), **options, ignore=["No Finding", "Hernia"])
    np.testing.assert_array_equal(labels(df), np.float32([[1, 1], [0, 0], [np.nan, np.nan], [1, 0]]))
    text = refuse(root, rows, **options, ignore=["No Finding", "Hernai"])
    assert "1 rows have the unknown class 'Hernia' in column 'f'. Did you mean \"Hernai\"? Known: 'Effusion'" in text


def test_a_column_for_each_class(root):
    rows = [{"m": "1", "e": "0.0"}, {"m": "", "e": "1.0"}]
    df = read_table(write(root, rows), label_columns={"Mass": "m", "Effusion": "e"})
    assert class_names(df) == ["Mass", "Effusion"]
    np.testing.assert_array_equal(labels(df), np.float32([[1, 0], [np.nan, 1]]))
    assert class_names(read_table(write(root, rows), label_columns=["e", "m"])) == ["e", "m"]
    text = refuse(root, [{"m": "1"}, {"m": "-1"}], label_columns=["m"])
    assert "line 3: column 'm' must be 1, 0 or blank. Received: '-1'" in text


def test_an_unknown_class_is_named_with_its_number(root):
    rows = [{"finding": "Pnuemonia"}, {"finding": "Pnuemonia"}, {"finding": "clear"}]
    text = refuse(root, rows, label="finding", classes={"Pneumonia": ["Pneumonia"]})
    assert "2 problems" in text
    assert "2 rows have the unknown class 'Pnuemonia' in column 'finding'. Did you mean \"Pneumonia\"?" in text
    assert "stands for another class too" in refuse(root, rows, label="finding", classes={"A": ["x"], "B": ["x"]})


@pytest.mark.parametrize(
    "options",
    [
        {"label": "f"},
        {"classes": ["A"]},
        {"label": "f", "classes": ["A"], "label_columns": ["f"]},
    ],
)
def test_labels_come_in_one_way(root, options):
    assert "labels are either `label`" in refuse(root, [{"f": "A"}], **options)


# --- files ----------------------------------------------------------------------------------------------------------


def test_paths_stay_inside_the_root(root, tmp_path):
    outside = tmp_path / "outside.png"
    Image.fromarray(np.zeros(SIZE, np.uint8)).save(outside)
    (root / "images" / "link.png").symlink_to(outside)
    (root / "up").symlink_to(tmp_path)
    (root / "images" / "alias.png").symlink_to(root / "images" / "a.png")
    for path in (str(outside), "../outside.png", "images/../../outside.png", str(root / "images" / "a.png")):
        assert "must be a path relative to" in refuse(root, [{"image": path}])
        assert "must be a path relative to" in refuse(root, [{"m": path}], mask="m")
    for path in ("images/link.png", "up/outside.png", "up/set/../outside.png"):
        text = refuse(root, [{"image": path}])
        assert f"Received: '{path}'" in text and ("leads out of" in text or "without '..'" in text)
    assert len(read_table(write(root, [{"image": "images/alias.png"}]))) == 1
    assert len(read_table(write(root, [{"image": "up/set/images/a.png"}]))) == 1  # out, and in again
    (tmp_path / "linked").symlink_to(root)  # a root that is a link itself is as good as any
    assert read_table(root / "films.csv", root=tmp_path / "linked")["image"][0].startswith(str(tmp_path / "linked"))


def test_the_root_can_be_another_folder_than_the_csvs(root, tmp_path):
    write(root, [{}]).rename(tmp_path / "films.csv")
    assert len(read_table(tmp_path / "films.csv", root=root)) == 1
    with pytest.raises(ManifestError, match=r"line 2, column 'image': there is no such file. Received: 'images/a.png'"):
        read_table(tmp_path / "films.csv")


def test_missing_and_repeated_files_are_collected(root):
    rows = [{}, {"image": ""}, {"image": "images"}, {"image": "images/z.png"}, {"image": "./images/a.png"}]
    rows += [{"image": "images/" + "x" * 300}]
    text = refuse(root, rows)
    assert "5 problems" in text
    assert "line 3, column 'image': is blank" in text
    assert "line 4, column 'image': there is no such file. Received: 'images'" in text
    assert "line 5, column 'image': there is no such file" in text
    assert "line 6: a.png is listed twice" in text
    assert "line 7, column 'image': " in text


# --- masks and boxes ------------------------------------------------------------------------------------------------


def test_masks_are_known_empty_or_unknown(root):
    rows = [{"m": "masks/a.png", "kind": "x", "neg": "0"}, {"neg": "1"}, {"neg": ""}, {"m": "masks/a.png", "kind": "y"}]
    df = read_table(write(root, rows), mask="m", mask_where={"kind": ["x"]}, mask_empty="neg")
    assert list(df["mask_known"]) == [True, True, False, False]
    masks = [row_mask(df.iloc[i], *SIZE) for i in range(4)]
    assert [None if mask is None else int(mask.sum()) for mask in masks] == [6, 0, None, None]
    assert "column 'neg' must be 1, 0 or blank. Received: 'yes'" in refuse(root, [{"neg": "yes"}], mask_empty="neg")


def test_an_annotation_goes_before_a_column_that_says_empty(root):
    rows = [{"m": "masks/a.png", "neg": "1"}]
    with pytest.warns(ManifestWarning, match="1 films have a mask or boxes though 'neg' is 1, the first in line 2"):
        df = read_table(write(root, rows), mask="m", mask_empty="neg")
    assert row_mask(df.iloc[0], *SIZE).sum() == 6


def test_boxes(root):
    rows = [{"b": "[[1, 2, 3, 4]]"}, {"b": "[]"}, {"b": ""}, {"b": "[{'x':0,'y':0,'width':2,'height':2}]"}]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        df = read_table(write(root, rows), boxes="b")
    assert list(df["boxes"]) == [[[1.0, 2.0, 3.0, 4.0]], [], [], [[0.0, 0.0, 2.0, 2.0]]]
    assert list(df["mask_known"]) == [True, True, False, True]  # an explicit empty list is an answer, a blank is none


def test_boxes_and_masks_are_held_against_their_films(root):
    rows = [{"b": "[[1, 2, 3, 4]]"}, {"b": "[[10, 2, 3, 4]]"}, {"b": "[[1, 2, 3]]"}, {"b": "[[1, 2, 0, 4]]"}]
    text = refuse(root, rows[:2], boxes="b")
    assert "line 3: box lies outside of its film, which is 10 pixels wide and 12 high" in text
    text = refuse(root, rows, boxes="b")
    assert "line 4: a box must be [x, y, width, height]" in text and "line 5: a box must have a positive" in text
    text = refuse(root, [{"m": "masks/turned.png"}], mask="m")
    assert "line 2: mask turned.png must have the size of its film, 12 x 10" in text and "Received: 10 x 12" in text
    (root / "masks" / "a.png").write_bytes(b"no picture")
    assert "line 2: mask a.png cannot be read" in refuse(root, [{"m": "masks/a.png"}], mask="m")
    with pytest.warns(ManifestWarning, match="1 boxes reach over the edge of their films.*line 2"):
        df = read_table(write(root, [{"b": "[[5, 6, 50, 4]]"}]), boxes="b")
    assert row_mask(df.iloc[0], *SIZE).sum() == 5 * 4


def test_a_film_that_cannot_be_read_is_left_for_preparation_to_reject(root):
    (root / "images" / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    assert len(read_table(write(root, [{"b": "[[1, 2, 3, 4]]"}, {}]), boxes="b")) == 2


def test_progress_counts_films_with_annotations(root):
    calls = []
    rows = [{"b": "[[1, 2, 3, 4]]"}, {}, {"b": "[[1, 2, 3, 4]]"}]
    read_table(write(root, rows), boxes="b", progress=lambda done, total: calls.append((done, total)))
    assert calls == [(1, 2), (2, 2)]
