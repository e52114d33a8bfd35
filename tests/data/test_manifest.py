"""The table that everything else takes: its checks, its CSV form, and masks."""

from __future__ import annotations

import csv
import math
import pickle
import struct
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cxr_tf.data.manifest import (
    COLUMNS,
    LABEL,
    ManifestError,
    class_names,
    clip_boxes,
    fill_boxes,
    labels,
    load_manifest,
    make_manifest,
    parse_boxes,
    read_csv,
    row_mask,
    rows_where,
    save_manifest,
    validate,
)
from cxr_tf.errors import CxrError


def columns(rows: int = 3, **changes) -> dict[str, list]:
    table = {
        "image": [f"/films/{i}.png" for i in range(rows)],
        "source": ["here"] * rows,
        "patient_id": [f"00{i}" for i in range(rows)],
        "study_id": [f"s{i}" for i in range(rows)],
        "view": ["PA"] * rows,
        "sex": [None] * rows,
        "age": [math.nan] * rows,
        "label:A": [1.0] * rows,
        "label:B": [0.0] * rows,
        "boxes": [[] for _ in range(rows)],
        "mask": [None] * rows,
        "mask_known": [False] * rows,
        "split": [None] * rows,
    }
    return table | changes


# --- the contract ---------------------------------------------------------------------------------------------------


def test_columns_have_one_order_and_labels_keep_theirs():
    given_order = {"fold": ["0"] * 3, "label:Z": [1.0] * 3, **columns()}
    df = make_manifest(given_order)
    assert list(df.columns) == [
        *COLUMNS[:7], "label:Z", "label:A", "label:B", *COLUMNS[7:], "fold"
    ]  # fmt: skip
    assert class_names(df) == ["Z", "A", "B"]


def test_labels_are_float32_in_the_order_asked_for():
    df = make_manifest(columns(**{"label:A": [1.0, 0.0, math.nan]}))
    np.testing.assert_array_equal(labels(df), np.float32([[1, 0], [0, 0], [np.nan, 0]]))
    np.testing.assert_array_equal(labels(df, ["B", "A"])[:, 1], np.float32([1, 0, np.nan]))
    assert labels(df).dtype == np.float32
    with pytest.raises(ManifestError, match=r"no class 'a'.*It has: A, B.*Received"):
        labels(df, ["a"])


def test_a_manifest_may_have_no_classes():
    table = {name: values for name, values in columns().items() if not name.startswith(LABEL)}
    assert labels(make_manifest(table)).shape == (3, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": ["/a", "/b", "/a"]}, "row 2: image occurs twice"),
        ({"image": ["/a", "b", "/c"]}, "row 1: image must be an absolute path"),
        ({"mask": [None, "b.png", None]}, "row 1: mask must be an absolute path"),
        ({"patient_id": ["1", "", "3"]}, "row 1: patient_id must be text and not blank"),
        ({"patient_id": ["1", 2, "3"]}, "row 1: patient_id must be text"),
        ({"study_id": ["s", "t", "s"]}, "rows 0 and 2: one study_id under two patients"),
        ({"sex": ["M", "F", "female"]}, 'row 2: sex must be "M", "F" or None'),
        ({"view": ["PA", "", None]}, "row 1: view must be text, or None"),
        ({"age": [1.0, -1.0, math.nan]}, "row 1: age must be 0 to 150"),
        ({"age": [1.0, math.inf, math.nan]}, "row 1: age must be 0 to 150"),
        ({"label:A": [1.0, 0.5, math.nan]}, "row 1: label:A must be 1, 0, or NaN"),
        ({"boxes": [[], None, []]}, "row 1: boxes must be a list"),
        ({"boxes": [[], [[1.0, 2.0, 3.0]], []]}, "row 1: a box must be"),
        ({"boxes": [[], [[1.0, 2.0, 0.0, 3.0]], []]}, "row 1: a box must have a positive width"),
        ({"boxes": [[], [[1.0, math.nan, 1.0, 3.0]], []]}, "row 1: a box must be four finite numbers"),
    ],
)
def test_a_row_that_breaks_the_contract_is_named(changes, message):
    with pytest.raises(ManifestError, match="(?s)" + message):
        make_manifest(columns(**changes))


def test_missing_columns_are_named_with_the_nearest():
    df = make_manifest(columns()).rename(columns={"patient_id": "patient"})
    with pytest.raises(ManifestError, match=r"column 'patient_id' is missing. Did you mean \"patient\"\?"):
        validate(df)
    with pytest.raises(ManifestError, match="no row"):
        validate(make_manifest(columns()).iloc[:0])
    with pytest.raises(ManifestError, match="column 'view' occurs twice"):
        validate(pd.concat([make_manifest(columns()), pd.DataFrame({"view": ["PA"] * 3})], axis=1))
    with pytest.raises(ManifestError, match="column 'age' must hold numbers"):
        validate(make_manifest(columns()).assign(age="young"))
    with pytest.raises(ManifestError, match="row 0: mask_known must be True or False"):
        validate(make_manifest(columns()).assign(mask_known="yes"))


def test_the_first_ten_problems_and_their_number():
    error = ManifestError([f"problem {i}" for i in range(23)], "table.csv")
    assert str(error).startswith("table.csv: 23 problems.\n  - problem 0\n")
    assert "problem 9" in str(error) and "problem 10" not in str(error)
    assert str(error).endswith("... and 13 more")
    assert isinstance(error, CxrError) and len(error.problems) == 23
    assert str(pickle.loads(pickle.dumps(error))) == str(error)  # noqa: S301 - our own, as processes exchange it
    assert str(ManifestError("one", "table.csv")) == "table.csv: one"


# --- CSV ------------------------------------------------------------------------------------------------------------

text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
word = text.filter(lambda value: value.strip())
coordinate = st.floats(-1e6, 1e6)
length = st.floats(1e-6, 1e6)
boxes_ = st.lists(st.tuples(coordinate, coordinate, length, length).map(list), max_size=3)
label_ = st.sampled_from([1.0, 0.0, math.nan])


@st.composite
def manifests(draw):
    rows = draw(st.integers(1, 4))

    def column(values):
        return draw(st.lists(values, min_size=rows, max_size=rows))

    names = draw(st.lists(word, unique=True, max_size=3))
    others = [n for n in draw(st.lists(word, unique=True, max_size=2)) if n not in COLUMNS and not n.startswith(LABEL)]
    return make_manifest(
        {
            "image": ["/" + path for path in draw(st.lists(text, min_size=rows, max_size=rows, unique=True))],
            "source": column(word),
            "patient_id": column(word),
            "study_id": draw(st.lists(word, min_size=rows, max_size=rows, unique=True)),
            "view": column(st.none() | word),
            "sex": column(st.sampled_from([None, "M", "F"])),
            "age": column(st.floats(0, 150) | st.just(math.nan)),
            **{LABEL + name: column(label_) for name in names},
            "boxes": column(boxes_),
            "mask": column(st.none() | text.map(lambda path: "/" + path)),
            "mask_known": column(st.booleans()),
            "split": column(st.none() | word),
            **{name: column(st.none() | text) for name in others},
        }
    )


@settings(max_examples=60, deadline=None)
@given(manifests())
def test_what_is_saved_is_what_is_loaded(tmp_path_factory, df):
    path = tmp_path_factory.mktemp("manifest") / "manifest.csv"
    save_manifest(df, path)
    pd.testing.assert_frame_equal(load_manifest(path), df, check_exact=True)
    assert [entry.name for entry in path.parent.iterdir()] == ["manifest.csv"]


def test_other_csv_readers_see_the_same(tmp_path):
    df = make_manifest(columns(boxes=[[[1.5, 2.0, 3.0, 4.0]], [], []], patient_id=['a,"b"', "007", "NA"]))
    save_manifest(df, tmp_path / "m.csv")
    seen = pd.read_csv(tmp_path / "m.csv", dtype=str, keep_default_na=False)
    assert list(seen["patient_id"]) == ['a,"b"', "007", "NA"]
    assert seen["boxes"][0] == "[[1.5, 2.0, 3.0, 4.0]]"


def test_a_manifest_that_cannot_be_written_leaves_the_old_one(tmp_path):
    path = tmp_path / "m.csv"
    save_manifest(make_manifest(columns()), path)
    before = path.read_bytes()
    with pytest.raises(ManifestError, match="UTF-8"):
        save_manifest(make_manifest(columns(image=["/a\udcff", "/b", "/c"])), path)
    with pytest.raises(ManifestError):
        save_manifest(make_manifest(columns()).assign(sex="x"), path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1
    (tmp_path / "folder").mkdir()
    with pytest.raises(CxrError, match="folder: cannot be written"):
        save_manifest(make_manifest(columns()), tmp_path / "folder")


def test_what_is_no_manifest_is_refused(tmp_path):
    path = tmp_path / "m.csv"
    with pytest.raises(ManifestError, match=r"nowhere.csv: cannot read it: No such file"):
        load_manifest(tmp_path / "nowhere.csv")
    save_manifest(make_manifest(columns()), path)
    rows = list(csv.reader(path.open(newline="")))

    def write(rows):
        with path.open("w", newline="") as file:
            csv.writer(file).writerows(rows)

    write([["image", *rows[0][2:]], *[[r[0], *r[2:]] for r in rows[1:]]])
    with pytest.raises(ManifestError, match="column 'source' is missing"):
        load_manifest(path)
    known, age = rows[0].index("mask_known"), rows[0].index("age")
    rows[1][known], rows[2][age] = "maybe", "old"
    write(rows)
    with pytest.raises(ManifestError, match=r"(?s)2 problems.*row 1, column 'age'.*'old'.*row 0, column 'mask_known'"):
        load_manifest(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "must name the columns"),
        (b"a,b\n1\n1,2\n1,2,3\n", "(?s)2 problems.*line 2: 1 fields.*line 4: 3 fields"),
        (b"a,a\n1,2\n", "column 'a' occurs twice"),
        (b"a,b\n1,\xff\n", "UTF-8"),
        (b'a,b\n1,"2\n', "line 2: not CSV"),
        (b"a\n" + b"x" * 200_000 + b"\n", "line 2: not CSV: field larger"),
    ],
)
def test_bad_csv_is_one_clear_error(tmp_path, content, message):
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(ManifestError, match=message):
        read_csv(tmp_path / "t.csv")


def test_csv_is_read_as_text(tmp_path):
    (tmp_path / "t.csv").write_bytes(b"\xef\xbb\xbfid, x ,\n007,NA,\n\n 1.0,  ,\n")
    df = read_csv(tmp_path / "t.csv")
    assert df.to_dict("list") == {"id": ["007", "1.0"], "x": ["NA", ""]}
    (tmp_path / "t.csv").write_text("id,x\n")
    assert list(read_csv(tmp_path / "t.csv").columns) == ["id", "x"]


# --- choosing rows --------------------------------------------------------------------------------------------------


def test_rows_where():
    df = pd.DataFrame({"fold": ["0", "1", "2.0", None], "view": ["PA", "AP", "PA", "LL"]})
    assert rows_where(df, {}).tolist() == [True] * 4
    assert rows_where(df, {"fold": [0, 2]}).tolist() == [True, False, True, False]
    assert rows_where(df, {"fold": ["0", ""]}).tolist() == [True, False, False, True]
    assert rows_where(df, {"view": ["PA"], "fold": [2, 1]}).tolist() == [False, False, True, False]
    with pytest.raises(ManifestError, match=r"no column 'Fold'. Did you mean \"fold\"\?"):
        rows_where(df, {"Fold": [1]})
    with pytest.raises(ManifestError, match=r"no row has 'P' in column 'view'.*It has: 'AP', 'LL', 'PA'"):
        rows_where(df, {"view": ["P"]})
    with pytest.raises(ManifestError, match=r"needs a list of values. Received: 'PA'"):
        rows_where(df, {"view": "PA"})


# --- boxes and masks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "written",
    [
        "[[1, 2, 3, 4.5]]",
        "((1,2,3,4.5),)",
        "[{'x': 1, 'y': 2, 'width': 3, 'height': 4.5}]",
        '[{"width": 3, "height": 4.5, "x": 1, "y": 2}]',
    ],
)
def test_boxes_are_read_from_json_and_python(written):
    assert parse_boxes(written) == [[1.0, 2.0, 3.0, 4.5]]


def test_no_boxes():
    assert parse_boxes("") == parse_boxes("  ") == parse_boxes("[]") == []


@pytest.mark.parametrize(
    "written",
    [
        "nan", "5", "'x'", "[1, 2, 3, 4]", "[[1, 2, 3]]", "[[1, 2, 3, '4']]", "[[1, 2, 3, True]]", "[[1, 2, -3, 4]]",
        "[[1, 2, NaN, 4]]", "[[1, 2, 1e999, 4]]", "[[1, 2, " + "9" * 400 + ", 4]]", "[{'x': 1}]", "[[1, 2, 3, 4]",
        "__import__('os').system('true')", "[" * 40_000, "[[1,2,3,4]," * 9_000, "[[1, 2, 3, 4*9**9**9]]", "\0",
        "-" * 9999 + "1", "{'x': 1, 'y': 2, 'width': 3, 'height': 4}",
    ],
)  # fmt: skip
def test_what_is_no_list_of_boxes_is_refused(written):
    with pytest.raises(ManifestError, match="Received") as caught:
        parse_boxes(written)
    assert len(str(caught.value)) < 300


def test_boxes_are_filled_where_pixel_centers_lie_in_them():
    expected = np.zeros((6, 8), np.uint8)
    expected[1:4, 2:5] = 1
    np.testing.assert_array_equal(fill_boxes([[2.0, 1.0, 3.0, 3.0]], 6, 8), expected)
    np.testing.assert_array_equal(fill_boxes([[1.6, 0.6, 3.8, 3.8]], 6, 8), expected)
    assert fill_boxes([[3.6, 2.6, 0.1, 0.1]], 6, 8).sum() == 1
    assert fill_boxes([[7.9, 5.9, 0.1, 0.1]], 6, 8)[5, 7] == 1
    assert fill_boxes([], 6, 8).sum() == 0 and fill_boxes([], 6, 8).dtype == np.uint8


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 40), st.integers(1, 40),
    st.lists(st.tuples(*[st.floats(-20, 60)] * 2, *[st.floats(0.01, 60)] * 2), max_size=3),
)  # fmt: skip
def test_filled_boxes_equal_a_loop_over_pixels(height, width, boxes):
    if any(x >= width or y >= height or x + w <= 0 or y + h <= 0 for x, y, w, h in boxes):
        with pytest.raises(ManifestError, match="outside of its film"):
            fill_boxes(boxes, height, width)
        return
    ys, xs = np.mgrid[:height, :width] + 0.5
    inside = np.zeros((height, width), bool)
    for x, y, w, h in boxes:
        inside |= (xs >= x) & (xs < x + w) & (ys >= y) & (ys < y + h)
    filled = fill_boxes(boxes, height, width)
    assert (filled[inside] == 1).all()
    assert filled.sum() <= inside.sum() + sum(height + width for _ in boxes)  # slivers between centers set a line
    for (_, _, w, h), (left, top, cw, ch) in zip(boxes, clip_boxes(boxes, height, width), strict=True):
        assert left >= 0 and top >= 0 and left + cw <= width + 1e-9 and top + ch <= height + 1e-9
        assert 0 < cw <= w + 1e-9 and 0 < ch <= h + 1e-9


def film(tmp_path: Path, pixels, name: str = "mask.png", **options) -> dict:
    path = tmp_path / name
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(path, **options)
    return {"mask": str(path), "boxes": [[0.0, 0.0, 1.0, 1.0]], "mask_known": True}


def test_a_mask_is_set_where_it_is_not_black(tmp_path):
    wanted = np.zeros((5, 7), np.uint8)
    wanted[1:3, 2:6] = 1
    gray = Image.fromarray(wanted * 255)
    palette = Image.fromarray(wanted).convert("P")
    palette.putpalette([0, 0, 0, 0, 255, 0] + [9] * 762)
    opaque = Image.merge("RGBA", [Image.new("L", (7, 5)), gray, Image.new("L", (7, 5)), Image.new("L", (7, 5), 255)])
    forms = [gray, Image.fromarray(wanted), gray.convert("1"), gray.convert("RGB"), palette, opaque]
    forms += [gray.convert("LA"), Image.fromarray((wanted * 3).astype(np.uint16))]
    for form in forms:
        mask = row_mask(film(tmp_path, form), 5, 7)
        np.testing.assert_array_equal(mask, wanted, err_msg=form.mode)
        assert mask.dtype == np.uint8


def test_unknown_is_none_and_known_without_boxes_is_empty():
    row = {"mask": None, "boxes": [[1.0, 1.0, 2.0, 2.0]], "mask_known": False}
    assert row_mask(row, 4, 4) is None
    assert row_mask(row | {"mask_known": True}, 4, 4).sum() == 4
    assert row_mask(row | {"mask_known": True, "boxes": []}, 4, 4).sum() == 0
    df = make_manifest(columns(mask_known=[True, False, True], boxes=[[], [], [[0.0, 0.0, 2.0, 1.0]]]))
    sums = [None if m is None else m.sum() for m in (row_mask(df.iloc[i], 4, 4) for i in range(3))]
    assert sums == [0, None, 2]


def test_a_mask_of_another_size_names_both(tmp_path):
    with pytest.raises(ManifestError, match=r"mask mask.png must have the size of its film, 7 x 5 .*Received: 5 x 7"):
        row_mask(film(tmp_path, np.zeros((5, 7), np.uint8)), 7, 5)


def test_bad_masks_are_one_clear_error(tmp_path):
    row = film(tmp_path, np.random.default_rng(0).integers(0, 2, (64, 64), np.uint8) * 255)
    whole = Path(row["mask"]).read_bytes()
    for content in (b"", b"GIF89a", whole[:20], whole[:40], whole[:-300], whole[:60] + b"\0" * 99 + whole[159:]):
        Path(row["mask"]).write_bytes(content)
        with pytest.raises(ManifestError, match=r"mask mask.png cannot be read") as caught:
            row_mask(row, 64, 64)
        assert str(tmp_path) not in str(caught.value)
    with pytest.raises(ManifestError, match="No such file"):
        row_mask(row | {"mask": str(tmp_path / "gone.png")}, 64, 64)
    jpeg = film(tmp_path, np.zeros((64, 64), np.uint8), "mask.jpg")
    with pytest.raises(ManifestError, match="no PNG"):
        row_mask(jpeg, 64, 64)


def test_a_huge_mask_in_a_few_bytes_is_never_decoded(tmp_path):
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 0, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(b"\0" * 10_000))
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + data + chunk(b"IEND", b""))
    row = {"mask": str(tmp_path / "bomb.png"), "boxes": [], "mask_known": True}
    with pytest.raises(ManifestError, match=r"64 x 64.*Received: 30000 x 30000"):
        row_mask(row, 64, 64)


def test_filled_boxes_agree_with_the_masks_of_the_real_set(cxr_data):
    boxes: dict[tuple[str, str], list] = {}
    for row in csv.DictReader((cxr_data / "boxes.csv").open(newline="")):
        box = [float(row[name]) for name in ("x", "y", "width", "height")]
        boxes.setdefault((row["image"], row["annotator"]), []).append(box)
    overlaps = []
    for row in csv.DictReader((cxr_data / "metadata.csv").open(newline="")):
        drawn = boxes.get((row["image"], "rsna"))
        if row["opacity_mask_kind"] != "opacity_bbox_rsna" or not drawn:
            continue
        size = int(row["height"]), int(row["width"])
        there = row_mask({"mask": str(cxr_data / row["opacity_mask"]), "boxes": [], "mask_known": True}, *size)
        here = row_mask({"mask": None, "boxes": drawn, "mask_known": True}, *size)
        overlaps.append((here & there).sum() / (here | there).sum())
    assert len(overlaps) > 90 and min(overlaps) > 0.95
