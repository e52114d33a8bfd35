"""The COVID-19 image data collection: its revisions, views and licenses, and what must not get through."""

from __future__ import annotations

import csv
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cxr_tf.data.manifest import COLUMNS, ManifestError, ManifestWarning, class_names, labels
from cxr_tf.data.readers.covid19 import CLASSES, FRONTAL, read_covid19
from cxr_tf.errors import CxrError

HEADER = [
    "patientid",
    "offset",
    "sex",
    "age",
    "finding",
    "RT_PCR_positive",
    "survival",
    "intubated",
    "intubation_present",
    "went_icu",
    "in_icu",
    "needed_supplemental_O2",
    "extubated",
    "temperature",
    "pO2_saturation",
    "leukocyte_count",
    "neutrophil_count",
    "lymphocyte_count",
    "view",
    "modality",
    "date",
    "location",
    "folder",
    "filename",
    "doi",
    "url",
    "license",
    "clinical_notes",
    "other_notes",
    "",
]  # the last column has no name
OLDEST = [
    "Patientid",
    "offset",
    "sex",
    "age",
    "finding",
    "survival",
    "view",
    "date",
    "location",
    "filename",
    "doi",
    " url",
    "license",
    "notes",
]
NOTES = 'A man, 65, said: "nothing", Secret^Name.\nOn day 3, SecretTown, he\r\nwas better, '
CAUSES = ["No finding", "COVID-19", "Other viral", "Bacterial", "Other"]


class Folder:
    """A small collection that tests can spoil before they write it; films are given by some of their columns."""

    def __init__(self, root: Path) -> None:
        self.root, self.header, self.end = root, HEADER, "\n"
        (root / "images").mkdir(parents=True)
        (root / "volumes").mkdir()
        (root / "volumes" / "coronacases_001.nii.gz").touch()
        film = {
            "patientid": "2",
            "offset": "0",
            "sex": "M",
            "age": "65",
            "view": "PA",
            "finding": "Pneumonia/Viral/COVID-19",
        }
        scan = {"modality": "CT", "view": "Axial"}
        self.rows = [
            film | {"filename": "a.jpeg", "license": "CC BY"},
            film | {"filename": "b.JPG", "license": "CC BY-NC-SA", "offset": "3", "view": "AP Supine"},
            film | {"filename": "c.png", "license": "CC BY-NC-SA", "offset": "3", "view": "L"},
            film
            | {"filename": "d.jpg", "patientid": "4", "sex": "F", "age": "", "finding": "Pneumonia/Bacterial/E.Coli"},
            film
            | {"filename": "e.PNG", "patientid": "5", "sex": "", "view": "AP", "finding": "No Finding", "offset": ""},
            film
            | {"filename": "f.jpg", "patientid": "6", "view": "AP erect", "finding": "todo", "license": "CC BY 4.0"},
            film | scan | {"filename": "g.jpg"},
            film | scan | {"filename": "coronacases_001.nii.gz", "folder": "volumes", "view": "Axial"},
        ]
        for row in self.rows[:-1]:
            self.image(row["filename"])

    def image(self, name: str) -> Path:
        path = self.root / "images" / name
        Image.new("L", (8, 8)).save(path, format="PNG")
        return path

    def read(self, start: str = "", **options):
        common = {"modality": "X-ray", "folder": "images", "date": "2020", "location": "SecretTown, Italy"}
        common |= {"clinical_notes": NOTES, "notes": NOTES, "url": "https://example.org/case", "": ""}
        with (self.root / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
            file.write(start)
            writer = csv.writer(file, lineterminator=self.end)
            writer.writerow(self.header)
            for row in self.rows:
                cells = {name.lower(): cell for name, cell in (common | row).items()}
                writer.writerow([cells.get(name.strip().lower(), "") for name in self.header])
        return read_covid19(self.root, **options)


@pytest.fixture
def folder(tmp_path) -> Folder:
    return Folder(tmp_path / "covid")


def quietly(folder: Folder, **options) -> pd.DataFrame:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return folder.read(**options)


def told(folder: Folder, **options) -> str:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        folder.read(**options)
    assert all(issubclass(w.category, ManifestWarning) for w in caught)
    return "\n".join(str(w.message) for w in caught)


def refuse(folder: Folder, **options) -> str:
    with warnings.catch_warnings(), pytest.raises(ManifestError) as caught:
        warnings.simplefilter("ignore")
        folder.read(**options)
    assert isinstance(caught.value, CxrError)
    return str(caught.value)


def causes(df: pd.DataFrame) -> list[str | None]:
    """The class of each film, None where its label is unknown."""
    values = labels(df)
    assert ((np.nansum(values, axis=1) == 1) | np.isnan(values).all(axis=1)).all()
    return [None if np.isnan(row).any() else class_names(df)[row.argmax()] for row in values]


# --- the real rows --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hierarchical", [False, True])
def test_the_real_rows(cxr_data, tmp_path, hierarchical):
    """Real rows, put back into the published layout, come out as the columns that they are kept in."""
    with (cxr_data / "metadata.csv").open(newline="") as file:
        kept = [row for row in csv.DictReader(file) if row["image"].startswith("images/ieee8023/")]
    # One film of a COVID-19 patient was read as clear: the kept set groups it by the patient, the collection's own
    # column, which is all that a reader has, by the film.
    clear = sorted(row["finding"] for row in kept if row["fine_label"] == "No Finding")
    assert clear == ["COVID-19", *["No finding"] * 4]
    above = {"COVID-19": "Pneumonia/Viral", "Varicella": "Pneumonia/Viral", "Lipoid": "Pneumonia"}
    above |= dict.fromkeys(("E.Coli", "Klebsiella", "Legionella", "Streptococcus"), "Pneumonia/Bacterial")
    above |= {"Pneumocystis": "Pneumonia/Fungal", "Bacterial": "Pneumonia"}
    (tmp_path / "images").mkdir()
    with (tmp_path / "metadata.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, HEADER, restval="", lineterminator="\r\n")
        writer.writeheader()
        for row in kept:
            (tmp_path / "images" / row["orig_name"]).write_bytes((cxr_data / row["image"]).read_bytes())
            label = row["fine_label"]
            writer.writerow(
                {
                    "patientid": row["patient_id"],
                    "sex": row["sex"],
                    "age": row["age"],
                    "finding": f"{above[label]}/{label}" if hierarchical and label in above else label,
                    "view": row["view"].replace("supine", "Supine"),
                    "modality": "X-ray",
                    "folder": "images",
                    "filename": row["orig_name"],
                    "license": row["licence"],
                    "url": row["attribution"],
                    "clinical_notes": NOTES,
                }
            )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        df = read_covid19(tmp_path)
    assert [Path(path).name for path in df["image"]] == [row["orig_name"] for row in kept] and len(df) == 203
    assert list(df["patient_id"]) == [row["patient_id"] for row in kept] and df["study_id"].nunique() == 203
    assert list(df["view"]) == [row["view"].upper() for row in kept]
    assert list(df["sex"]) == [row["sex"] or None for row in kept]
    np.testing.assert_array_equal(df["age"], [float(row["age"] or "nan") for row in kept])
    assert list(df["license"]) == [row["licence"] for row in kept]
    groups = ["No finding" if row["fine_label"] == "No Finding" else row["finding"] for row in kept]
    assert causes(df) == [None if group == "Pneumonia (unspecified)" else group for group in groups]
    assert not df["mask_known"].any()
    with pytest.warns(ManifestWarning, match=r"64 of 203 rows are read; left out: 139 with other licenses"):
        free = read_covid19(tmp_path, licenses=["CC BY", "CC BY 3.0", "CC BY 4.0"])
    assert set(free["license"]) == {"CC BY", "CC BY 3.0", "CC BY 4.0"}


# --- columns --------------------------------------------------------------------------------------------------------


def test_rows_labels_and_patients(folder):
    df = quietly(folder)
    assert [Path(path).name for path in df["image"]] == ["a.jpeg", "b.JPG", "d.jpg", "e.PNG", "f.jpg"]
    assert df["image"][0] == str(folder.root / "images" / "a.jpeg")
    assert class_names(df) == CAUSES
    assert causes(df) == ["COVID-19", "COVID-19", "Bacterial", "No finding", None]
    assert list(df["patient_id"]) == ["2", "2", "4", "5", "6"]
    assert list(df["study_id"]) == ["2/0", "2/3", "4/0", "5/e.PNG", "6/0"]
    assert list(df["view"]) == ["PA", "AP SUPINE", "PA", "AP", "AP ERECT"]
    assert list(df["sex"]) == ["M", "M", "F", None, "M"]
    np.testing.assert_array_equal(df["age"], [65, 65, np.nan, 65, 65])
    assert list(df["license"]) == ["CC BY", "CC BY-NC-SA", None, None, "CC BY 4.0"]
    assert list(df["split"]) == [None] * 5 and set(df["source"]) == {"covid19"} and not df["mask_known"].any()


def test_nothing_of_notes_places_and_dates_gets_through(folder):
    df = quietly(folder, views="all")
    assert set(df.columns) == {*COLUMNS, *(f"label:{name}" for name in CAUSES), "finding", "license"}
    everything = " ".join(str(value) for value in df.to_numpy().ravel())
    assert not any(word in everything for word in ("Secret", "2020", "example.org", "better"))


@pytest.mark.parametrize("start", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_line_ends_and_byte_order_marks(folder, start, end):
    expected = quietly(folder)
    folder.end = end
    pd.testing.assert_frame_equal(quietly(folder, start=start), expected)


def test_columns_in_another_order(folder):
    expected = quietly(folder)
    folder.header = ["", *HEADER[-2::-1], ""]
    pd.testing.assert_frame_equal(quietly(folder), expected)


def test_the_oldest_revision(folder):
    """Without modality and folder, flat findings, and CT for a view."""
    folder.header = OLDEST
    folder.rows[0]["finding"], folder.rows[1]["finding"], folder.rows[3]["finding"] = (
        "COVID-19",
        "COVID-19, ARDS",
        "SARS",
    )
    folder.rows[6]["view"] = "CT"
    assert causes(quietly(folder)) == ["COVID-19", "COVID-19", "Other viral", "No finding", None]
    assert len(quietly(folder, views="all")) == 6 and "2 of CT" in told(folder)


def test_progress_reaches_the_end(folder):
    calls = []
    quietly(folder, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(5, 5)]


def test_ages(folder):
    for row, age in zip(folder.rows, ["65.5", "150", "c. 70", "0", "18", ""], strict=False):
        row["age"] = age
    np.testing.assert_array_equal(quietly(folder, views="all")["age"], [65.5, np.nan, np.nan, 0, 18, np.nan])


def test_films_without_a_patient_are_patients_of_their_own(folder):
    folder.rows[0]["patientid"] = folder.rows[3]["patientid"] = ""
    df = quietly(folder)
    assert list(df["patient_id"]) == ["film a.jpeg", "2", "film d.jpg", "5", "6"] and df["study_id"].is_unique
    assert "2 of 5 rows have no patientid: each such film counts as a patient of its own" in told(folder)


# --- views and licenses ---------------------------------------------------------------------------------------------


def test_what_is_left_out_is_counted(folder):
    text = told(folder)
    assert "5 of 8 rows are read; left out: 2 of CT; 1 of other views ('L' 1)" in text
    text = told(folder, views="all", licenses=["cc by 4.0", ""])
    assert "3 of 8 rows are read; left out: 2 of CT; 3 with other licenses ('CC BY-NC-SA' 2, 'CC BY' 1)" in text


def test_views_are_chosen(folder):
    df = quietly(folder, views="all")
    assert list(df["view"]) == ["PA", "AP SUPINE", "LATERAL", "PA", "AP", "AP ERECT"]
    assert len(quietly(folder, views=["L", "pa"])) == 3
    assert len(quietly(folder, views=["PA", FRONTAL[-1]])) == 2  # a frontal view that the file happens to lack
    text = refuse(folder, views=["PA", "AP suppine"])
    assert "`views`: no film has 'AP suppine'. Did you mean \"AP Supine\"?" in text and "'PA' 2" in text
    assert "`views` needs a list" in refuse(folder, views="PA") and "`views` needs a list" in refuse(folder, views=[])
    folder.rows[0]["view"] = ""
    assert quietly(folder, views="all")["view"][0] is None and len(quietly(folder)) == 4


def test_licenses_are_taken_by_their_whole_name(folder):
    df = quietly(folder, licenses=["CC BY"])
    assert list(df["license"]) == ["CC BY"]  # neither CC BY 4.0 nor CC BY-NC-SA, which ask for more
    assert list(quietly(folder, licenses=["CC BY", "CC BY 4.0"])["license"]) == ["CC BY", "CC BY 4.0"]
    assert list(quietly(folder, licenses=[""])["license"]) == [None, None]
    text = refuse(folder, licenses=["CC-BY 4.0"])
    assert "`licenses`: no film has 'CC-BY 4.0'. Did you mean \"CC BY 4.0\"?" in text
    assert "In the file: 'CC BY-NC-SA' 2, '' 2, 'CC BY' 1, 'CC BY 4.0' 1" in text
    assert "`licenses` needs a list" in refuse(folder, licenses="CC BY")
    folder.rows[5]["view"] = "L"
    assert "none of its 8 rows is left" in refuse(folder, licenses=["CC BY 4.0"])


@pytest.mark.parametrize(
    "change",
    [
        {"modality": "CT", "view": "PA"},
        {"modality": "ct", "view": ""},
        {"modality": "", "view": "Coronal"},
        {"modality": "X-ray", "folder": "volumes"},
        {"modality": "", "folder": "", "filename": "x.NII.GZ"},
    ],
)
def test_ct_never_gets_in(folder, change):
    folder.rows[0] |= change
    df = quietly(folder, views="all")
    assert len(df) == 5 and "a.jpeg" not in df["image"][0]


# --- classes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("finding", "cause"),
    [
        ("No Finding", "No finding"),
        ("Pneumonia/Viral/COVID-19", "COVID-19"),
        ("COVID-19", "COVID-19"),
        ("COVID-19, ARDS", "COVID-19"),
        ("ARDS, COVID-19", "COVID-19"),
        ("Pneumonia/Viral/SARS", "Other viral"),
        ("Pneumonia/Viral/Influenza/H1N1", "Other viral"),
        ("Pneumonia/Viral/Herpes ", "Other viral"),
        ("Herpes pneumonia, ARDS", "Other viral"),
        ("Swine-Origin Influenza A (H1N1) Viral Pneumonia", "Other viral"),
        ("MERS-CoV", "Other viral"),
        ("Pneumonia/Bacterial", "Bacterial"),
        ("Pneumonia/Bacterial/Staphylococcus/MRSA", "Bacterial"),
        ("Mycoplasma Bacterial Pneumonia", "Bacterial"),
        ("E.Coli", "Bacterial"),
        ("Pneumonia/Fungal/Pneumocystis", "Other"),
        ("Pneumocystis", "Other"),
        ("Pneumonia/Lipoid", "Other"),
        ("Tuberculosis", "Other"),
        ("ARDS", "Other"),
        ("cryptogenic organizing pneumonia", "Other"),
        ("Pneumonia", None),
        ("Round pneumonia", None),
        ("todo", None),
        ("Unknown", None),
        ("", None),
    ],
)
def test_findings_of_both_spellings(folder, finding, cause):
    folder.rows[0]["finding"] = finding
    df = quietly(folder)
    assert causes(df)[0] == cause and df["finding"][0] == (finding.strip() or None)
    assert "no class" not in told(folder)


@pytest.mark.parametrize(
    "finding", ["Pneumonia/Vrial/SARS", "Fibrosis", "COVID-19, Klebsiella", "No Finding, COVID-19"]
)
def test_findings_of_no_class_are_named(folder, finding):
    folder.rows[0]["finding"] = finding
    assert causes(quietly(folder))[0] is None
    assert f"1 films have findings of no class, or of several, and no label: {finding!r} 1." in told(folder)


def test_other_classes(folder):
    classes = {"Clear": ["No Finding"], "Pneumonia": ["Pneumonia"]}
    df = quietly(folder, classes=classes)
    assert class_names(df) == ["Clear", "Pneumonia"]
    assert causes(df) == ["Pneumonia", "Pneumonia", "Pneumonia", "Clear", None]
    folder.rows[0]["finding"] = "Pneumonia/Viral/SARS"
    df = quietly(folder, classes={"Viral": ["Pneumonia/Viral"], "COVID-19": ["pneumonia/viral/covid-19"]})
    assert causes(df) == ["Viral", "COVID-19", None, None, None]  # the closest name counts
    assert "finding 'a' is in two classes, 'B' is the second" in refuse(folder, classes={"A": ["A"], "B": ["a"]})
    assert "class 'A' needs a list" in refuse(folder, classes={"A": "x"})
    assert "must be {class: [findings]}" in refuse(folder, classes={})


@settings(max_examples=40, deadline=None)
@given(
    cause=st.sampled_from([(name, path) for name, paths in CLASSES.items() for path in paths]),
    below=st.lists(st.text("abcXYZ -.", min_size=1).filter(str.strip), max_size=2),
    upper=st.booleans(),
)
def test_a_finding_stands_for_all_below_it(tmp_path_factory, cause, below, upper):
    name, path = cause
    finding = "/".join([path, *below])
    root = tmp_path_factory.mktemp("covid")
    (root / "images").mkdir()
    (root / "images" / "a.png").touch()
    cells = ["1", "0", "M", "3", finding.upper() if upper else finding, "PA", "a.png", ""]
    with (root / "metadata.csv").open("w", newline="") as file:
        csv.writer(file).writerows(
            [["patientid", "offset", "sex", "age", "finding", "view", "filename", "license"], cells]
        )
    df = read_covid19(root)
    under_covid = (
        name == "Other viral" and path == "Pneumonia/Viral" and below and below[0].strip().lower() == "covid-19"
    )
    assert causes(df) == [name if not under_covid else "COVID-19"]


# --- files ----------------------------------------------------------------------------------------------------------


def test_a_missing_film_is_named(folder):
    (folder.root / "images" / "d.jpg").unlink()
    text = refuse(folder)
    assert text.endswith("metadata.csv: row 4: there is no file images/d.jpg")
    (folder.root / "images" / "b.JPG").rename(folder.root / "images" / "b.jpg")
    text = refuse(folder)
    assert "2 problems" in text and 'row 2: there is no file images/b.JPG, but there is "b.jpg"' in text
    folder.rows[1]["view"] = folder.rows[3]["view"] = "L"
    assert len(quietly(folder)) == 3  # films that are left out need not be there


def test_files_that_no_row_names_are_counted(folder):
    folder.image("stray.png")
    folder.image(".hidden.png")
    assert "no row names 1 files of images/, which are not read, the first is stray.png" in told(folder)


def test_links_and_names_do_not_lead_out(folder, tmp_path):
    outside = folder.image("a.jpeg").rename(tmp_path / "outside.png")
    (folder.root / "images" / "a.jpeg").symlink_to(outside)
    assert "images/a.jpeg leads out of" in refuse(folder)
    (folder.root / "images" / "a.jpeg").unlink()
    (folder.root / "images" / "a.jpeg").symlink_to(folder.root / "images" / "b.JPG")
    assert len(quietly(folder)) == 5
    for name in ("../../outside.png", str(outside), "images/b.JPG", "..", ""):
        folder.rows[0]["filename"] = name
        assert f"row 1: filename must be a file's name, without folders. Received: {name!r}" in refuse(folder)
    folder.rows[0]["filename"] = "a.jpeg"
    (tmp_path / "linked").symlink_to(folder.root)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder.read()
        assert read_covid19(tmp_path / "linked")["image"][1] == str(tmp_path / "linked" / "images" / "b.JPG")
    (folder.root / "images").rename(tmp_path / "elsewhere")
    (folder.root / "images").symlink_to(tmp_path / "elsewhere")
    assert "images/ leads out of it" in refuse(folder)


def test_a_folder_of_another_kind_is_told_what_it_should_hold(folder, tmp_path):
    for wrong in (tmp_path, tmp_path / "nowhere", folder.root / "images"):
        with pytest.raises(ManifestError, match=r"no metadata.csv in it. A COVID-19 image data collection holds"):
            read_covid19(wrong)
    quietly(folder)
    (folder.root / "images").rename(tmp_path / "aside")
    with pytest.raises(ManifestError, match="no images in it"):
        read_covid19(folder.root)
    (folder.root / "images").touch()
    with pytest.raises(ManifestError, match="cannot be listed"):
        read_covid19(folder.root)


# --- what does not fit together -------------------------------------------------------------------------------------


def missing_column(folder):
    folder.header = ["fillname" if name == "filename" else name for name in HEADER]


def british_license(folder):
    folder.header = ["licence" if name == "license" else name for name in HEADER]


def misspelled_modality(folder):
    folder.header = ["modalty" if name == "modality" else name for name in HEADER]


def column_twice(folder):
    folder.header = [*HEADER[:-1], "View"]


def listed_twice(folder):
    folder.rows.append(dict(folder.rows[0]))


def named_twice(folder):
    folder.rows[1]["filename"] = "a.jpeg"


def no_rows(folder):
    folder.rows = []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (missing_column, "column 'filename' is missing. Did you mean \"fillname\"?"),
        (british_license, "column 'license' is missing. Did you mean \"licence\"?"),
        (misspelled_modality, "column 'modality' is missing. Did you mean \"modalty\"?"),
        (column_twice, "are the same"),
        (listed_twice, "row 9: a.jpeg is listed twice, first in row 1"),
        (named_twice, "row 2: a.jpeg is listed twice, first in row 1"),
        (no_rows, "it has no row"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_does_not_fit_together_is_named(folder, change, message):
    change(folder)
    text = refuse(folder)
    assert message in text and "Secret" not in text


def test_rows_that_are_no_csv(folder):
    quietly(folder)
    path = folder.root / "metadata.csv"
    good = path.read_bytes()
    for bad, message in (
        (good.replace(b"65,", b"65,,", 1), "31 fields, but the first has 30"),
        (good + b'9,"open', "not CSV"),
        (good.replace(b"SecretTown", b"\xe9\xff"), "must be UTF-8"),
        (b"", "must name the columns"),
    ):
        path.write_bytes(bad)
        with pytest.raises(ManifestError, match=message):
            read_covid19(folder.root)


def test_all_problems_come_in_one_error(folder):
    folder.rows += [folder.rows[0] | {"filename": f"{i}.png", "patientid": "Secret"} for i in range(30)]
    text = refuse(folder)
    assert text.count("\n  - ") == 10 and "30 problems" in text and "and 20 more" in text and "Secret" not in text
