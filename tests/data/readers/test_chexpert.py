"""CheXpert's folder in its three layouts: its traps, and what does not fit together."""

from __future__ import annotations

import csv
import os
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cxr_tf.data.manifest import ManifestError, ManifestWarning, class_names, labels, load_manifest, save_manifest
from cxr_tf.data.readers.chexpert import FINDINGS, read_chexpert
from cxr_tf.errors import CxrError

HEADER = ["Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", *FINDINGS]
SMALL = "CheXpert-v1.0-small"
BATCHES = [f"CheXpert-v1.0 batch {name}" for name in ("1 (validate & csv)", "2 (train 1)", "3 (train 2)")]
nan = np.nan


def row(path: str, *described: str, **findings: str) -> list[str]:
    """A row of the CSV; findings by their names with "_" for a space."""
    by_name = {name.replace("_", " "): value for name, value in findings.items()}
    assert set(by_name) <= set(FINDINGS)
    return [path, *described, *(by_name.get(name, "") for name in FINDINGS)]


class Folder:
    """A small CheXpert that tests can spoil before they write it."""

    def __init__(self, root: Path) -> None:
        self.root = root  # holds the CSV files
        train, valid = f"{SMALL}/train", f"{SMALL}/valid"
        self.header = list(HEADER)
        self.train = [
            row(f"{train}/patient00001/study1/view1_frontal.jpg", "Female", "68", "Frontal", "AP", No_Finding="1.0"),
            row(
                f"{train}/patient00002/study1/view1_frontal.jpg", "Male", "87", "Frontal", "PA", Edema="-1.0",
                Consolidation="-1.0", Fracture="1.0", Support_Devices="0.0",
            ),
            row(f"{train}/patient00002/study1/view2_lateral.jpg", "Male", "87", "Lateral", "", Edema="-1.0"),
            row(f"{train}/patient00002/study2/view1_frontal.jpg", "Male", "88", "Frontal", "LL", Support_Devices="1.0"),
            row(f"{train}/patient00003/study1/view1_frontal.jpg", "Unknown", "0", "Frontal", "AP", Edema="0.0"),
        ]  # fmt: skip
        self.valid = [
            row(
                f"{valid}/patient64541/study1/view1_frontal.jpg", "Male", "73", "Frontal", "AP",
                **{name.replace(" ", "_"): "0.0" for name in FINDINGS},
            ),
            row(f"{valid}/patient64542/study1/view2_lateral.jpg", "Female", "70", "Lateral", "", Edema="1.0"),
        ]  # fmt: skip
        for cells in (*self.train, *self.valid):
            self.film(cells[0])

    def film(self, path: str) -> Path:
        file = self.root / path.removeprefix(f"{SMALL}/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
        return file

    def write(self) -> Path:
        for name, rows in (("train.csv", self.train), ("valid.csv", self.valid)):
            with (self.root / name).open("w", newline="") as file:
                csv.writer(file, lineterminator="\n").writerows([self.header, *rows])
        return self.root

    def read(self, **options):
        return read_chexpert(self.write(), **options)


@pytest.fixture
def folder(tmp_path) -> Folder:
    return Folder(tmp_path / SMALL)


def message(call) -> str:
    with pytest.raises(ManifestError) as caught:
        call()
    assert isinstance(caught.value, CxrError)
    return str(caught.value)


def of(df, name: str) -> list[float]:
    return labels(df, [name])[:, 0].tolist()


def test_rows(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        df = folder.read()
    assert class_names(df) == list(FINDINGS)
    assert list(df["image"]) == [str(folder.root / cells[0].removeprefix(f"{SMALL}/")) for cells in folder.train]
    assert list(df["patient_id"]) == ["patient00001", *["patient00002"] * 3, "patient00003"]
    assert df["study_id"][1] == df["study_id"][2] == "patient00002/study1" and df["study_id"].nunique() == 4
    assert list(df["view"]) == ["AP", "PA", "LATERAL", None, "AP"]  # LL on a frontal film: it may be either
    assert list(df["sex"]) == ["F", "M", "M", "M", None]
    np.testing.assert_array_equal(df["age"], [68, 87, 87, 88, nan])
    assert set(df["source"]) == {"chexpert"} and list(df["split"]) == [None] * 5
    assert not df["mask_known"].any() and list(df["boxes"]) == [[]] * 5


def test_the_manifest_can_be_kept(folder, tmp_path):
    df = folder.read(split="all")
    save_manifest(df, tmp_path / "manifest.csv")
    assert load_manifest(tmp_path / "manifest.csv").equals(df)


def test_splits(folder):
    df = folder.read(split="validation")
    assert list(df["split"]) == ["validation"] * 2 and list(df["patient_id"]) == ["patient64541", "patient64542"]
    assert list(df["view"]) == ["AP", "LATERAL"] and of(df, "Edema") == [0, 1] and of(df, "No Finding") == [0, 0]
    df = folder.read(split="all")
    assert list(df["split"]) == [None] * 5 + ["validation"] * 2 and len(df) == 7
    shutil.rmtree(folder.root / "valid")  # what one half needs is asked for that half alone
    assert "there is no folder 'valid' beside valid.csv" in message(lambda: folder.read(split="all"))
    (folder.root / "valid.csv").unlink()
    assert "there is no valid.csv in it" in message(lambda: read_chexpert(folder.root, split="all"))
    assert len(read_chexpert(folder.root)) == 5


def test_a_patient_is_in_one_of_the_files(folder):
    folder.valid.append(row(f"{SMALL}/valid/patient00003/study9/view1_frontal.jpg", "", "", "Frontal", ""))
    folder.film(folder.valid[-1][0])
    assert len(folder.read()) == 5
    text = message(lambda: folder.read(split="all"))
    assert "valid.csv: line 4: its patient is in train.csv: line 6 too; nobody may be in both files" in text


# --- labels ---------------------------------------------------------------------------------------------------------


def assert_labels(df, name: str, expected: list[float]) -> None:
    np.testing.assert_array_equal(of(df, name), expected)


def test_by_default_nothing_is_claimed(folder):
    df = folder.read()
    assert_labels(df, "Edema", [nan, nan, nan, nan, 0])
    assert_labels(df, "Fracture", [nan, 1, nan, nan, nan])
    assert_labels(df, "Support Devices", [nan, 0, nan, 1, nan])
    # A blank "No Finding" is 0 beside a finding, which a device and an uncertain one are not.
    assert_labels(df, "No Finding", [1, 0, nan, nan, nan])


def test_uncertain_findings(folder):
    assert_labels(folder.read(uncertain="one"), "Edema", [nan, 1, 1, nan, 0])
    assert_labels(folder.read(uncertain="zero"), "Edema", [nan, 0, 0, nan, 0])
    df = folder.read(uncertain={"Edema": "one", "Consolidation": "zero"})
    assert_labels(df, "Edema", [nan, 1, 1, nan, 0])
    assert_labels(df, "Consolidation", [nan, 0, nan, nan, nan])
    assert_labels(folder.read(uncertain={"Edema": "one"}), "Consolidation", [nan] * 5)


def test_blanks_as_zero(folder):
    df = folder.read(blank="zero")
    assert_labels(df, "Edema", [0, nan, nan, 0, 0])  # what is uncertain stays so
    assert_labels(df, "No Finding", [1, 0, 0, 0, 0])
    assert not np.isnan(labels(folder.read(blank="zero", uncertain="one"))).any()


def test_findings_are_chosen_and_ordered(folder):
    df = folder.read(findings=["No Finding", "Edema"], uncertain={"Fracture": "one"})
    assert class_names(df) == ["No Finding", "Edema"]
    assert_labels(df, "No Finding", [1, 0, nan, nan, nan])  # from the finding that was not chosen, too
    folder.train[0][HEADER.index("Pneumonia")] = "maybe"  # of no account for these
    assert class_names(folder.read(findings=["Edema"])) == ["Edema"]
    assert class_names(folder.read(findings=[])) == []


@settings(max_examples=30, deadline=None)
@given(
    cells=st.lists(st.sampled_from(["", "0.0", "1.0", "-1.0", "0", "1", "-1"]), min_size=13, max_size=13),
    uncertain=st.sampled_from(["ignore", "one", "zero"]),
    blank=st.sampled_from(["ignore", "zero"]),
)
def test_each_cell_is_read_by_its_own_rule(tmp_path_factory, cells, uncertain, blank):
    folder = Folder(tmp_path_factory.mktemp("set"))
    folder.train = [[*folder.train[0][:5], "", *cells]]
    rule = {
        "": {"ignore": nan, "zero": 0}[blank],
        "0": 0,
        "1": 1,
        "-1": {"ignore": nan, "one": 1, "zero": 0}[uncertain],
    }
    values = labels(folder.read(uncertain=uncertain, blank=blank))[0]
    np.testing.assert_array_equal(values[1:], [rule[cell.removesuffix(".0")] for cell in cells])
    assert values[0] != 1


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"split": "valid"}, 'split must be "train", "validation" or "all". Received: \'valid\''),
        ({"blank": "one"}, 'blank must be "ignore" or "zero". Received: \'one\''),
        ({"uncertain": "ones"}, 'uncertain must be "ignore", "one" or "zero", or a mapping of findings to these.'),
        ({"uncertain": {"Edema": "1"}}, "Received: '1'"),
        (
            {"uncertain": {"edema": "one"}},
            "uncertain: there is no finding 'edema'. Did you mean \"Edema\"? Known: No F",
        ),
        ({"findings": ["Effusion"]}, "findings: there is no finding 'Effusion'. Did you mean \"Pleural Effusion\"?"),
        ({"findings": "Edema"}, "findings must be a list that names each once. Received: 'Edema'"),
        ({"findings": ["Edema", "Edema"]}, "findings must be a list that names each once"),
    ],
)
def test_options_that_do_not_exist(folder, options, expected):
    assert expected in message(lambda: folder.read(**options))


# --- views ----------------------------------------------------------------------------------------------------------


def test_frontal_only_needs_no_lateral_file(folder):
    (folder.root / "train/patient00002/study1/view2_lateral.jpg").unlink()
    df = folder.read(frontal_only=True)
    assert list(df["view"]) == ["AP", "PA", None, "AP"] and len(df) == 4
    assert "line 4: there is no such file" in message(folder.read)
    folder.valid = folder.valid[1:]
    assert "no row names a frontal film" in message(lambda: folder.read(split="validation", frontal_only=True))


def test_a_name_that_contradicts_its_row_is_told(folder):
    folder.train[3][3:5] = ["Lateral", "RL"]
    with pytest.warns(ManifestWarning, match=r"1 films are frontal by their name.*first is in train\.csv: line 5"):
        df = folder.read()
    assert df["view"][3] == "LATERAL"


# --- layout ---------------------------------------------------------------------------------------------------------


def test_the_folder_may_have_any_name_and_paths_either_beginning(folder, tmp_path):
    expected = folder.read()
    assert read_chexpert(tmp_path).equals(expected)  # the folder that it is in
    folder.train = [[cells[0].replace("-small", ""), *cells[1:]] for cells in folder.train]
    assert folder.read().equals(expected)
    renamed = folder.root.rename(tmp_path / "chexpert 2019")
    for root in (renamed, tmp_path):
        df = read_chexpert(root)
        assert len(df) == 5 and all(Path(path).is_relative_to(renamed) for path in df["image"])
    shutil.copytree(renamed, tmp_path / "CheXpert-v1.0")
    text = message(lambda: read_chexpert(tmp_path))
    assert "a train.csv in several folders of it; give one of them. Received: 'CheXpert-v1.0', 'chexpert 2019'" in text


@pytest.fixture
def batches(folder, tmp_path) -> Path:
    """The full-size set as it is downloaded: three of its batches, unpacked side by side."""
    root = tmp_path / "chexpertchestxrays-u20210408"
    first, second, third = (root / name for name in BATCHES)
    first.mkdir(parents=True)
    folder.train = [[cells[0].replace("-small", ""), *cells[1:]] for cells in folder.train]
    folder.write()
    for name in ("train.csv", "valid.csv", "valid"):
        (folder.root / name).rename(first / name)
    for batch, patients in ((second, ["patient00001", "patient00002"]), (third, ["patient00003"])):
        batch.mkdir()
        for patient in patients:
            (folder.root / "train" / patient).rename(batch / patient)
    return root


def test_batches_are_read_as_they_are(batches):
    df = read_chexpert(batches, split="all")
    assert len(df) == 7 and all(Path(path).is_file() for path in df["image"])
    assert Path(df["image"][4]).parts[-4] == BATCHES[2] and Path(df["image"][5]).parts[-5] == BATCHES[0]
    assert len(read_chexpert(batches / BATCHES[0], split="validation")) == 2
    for name in ("train.csv", "valid.csv"):  # some move the CSV files up
        (batches / BATCHES[0] / name).rename(batches / name)
    assert read_chexpert(batches, split="all").equals(df)


def test_batches_that_are_not_all_there(batches):
    text = message(lambda: read_chexpert(batches / BATCHES[0]))
    assert "there is no folder 'train' beside train.csv." in text and "Of the full-size set in batches, give" in text
    shutil.rmtree(batches / BATCHES[2])
    text = message(lambda: read_chexpert(batches))
    assert "train.csv: line 6: there is no such file. Received: 'train/patient00003/study1/view1_frontal.jpg'" in text


def test_a_folder_of_another_kind_is_told_what_it_should_hold(folder, tmp_path):
    folder.write()
    (tmp_path / "empty").mkdir()
    for wrong in (tmp_path / "empty", tmp_path / "nowhere", folder.root / "train", folder.root / "train.csv"):
        text = message(lambda wrong=wrong: read_chexpert(wrong))
        assert "there is no train.csv in it. A CheXpert folder (CheXpert-v1.0-small, CheXpert-v1.0) holds" in text
    (folder.root / "train").rename(folder.root / "training")
    assert "there is no folder 'train' beside train.csv" in message(lambda: read_chexpert(folder.root))


def test_files_as_spreadsheets_write_them(folder):
    expected = folder.read()
    path = folder.root / "train.csv"
    lines = path.read_text().splitlines()
    quoted = [",".join(f'"{cell}"' for cell in line.split(",")) for line in lines]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join([*quoted, "", ""]).encode())
    assert read_chexpert(folder.root).equals(expected)


def test_further_columns_are_of_no_account(folder):
    folder.header.append("fold")
    folder.train = [[*cells, "1"] for cells in folder.train]
    assert len(folder.read()) == 5


def test_progress_reaches_the_end(folder):
    calls = []
    folder.read(progress=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (5, 5)


def test_links_stay_inside_the_root(folder, tmp_path):
    study = folder.root / "train" / "patient00002" / "study2"
    outside = tmp_path / "elsewhere"
    shutil.copytree(study, outside / "study2")
    patient = folder.root / "train" / "patient00003"
    patient.rename(folder.root / "kept")
    patient.symlink_to(folder.root / "kept")
    assert len(folder.read()) == 5  # within the root links are as good as folders
    (tmp_path / "linked").symlink_to(folder.root)
    assert read_chexpert(tmp_path / "linked")["image"][0].startswith(str(tmp_path / "linked"))

    film = study / "view1_frontal.jpg"
    film.unlink()
    film.symlink_to(outside / "study2" / "view1_frontal.jpg")
    told = "train.csv: line 5: leads out of the folder. Received: 'train/patient00002/study2/view1_frontal.jpg'"
    assert told in message(folder.read)
    film.unlink()
    film.symlink_to(folder.root / "gone.jpg")
    assert "line 5: there is no such file" in message(folder.read)
    shutil.rmtree(study)
    study.symlink_to(outside / "study2")
    assert told in message(folder.read)
    patient.unlink()
    patient.symlink_to(tmp_path)
    assert "line 6: leads out of the folder" in message(folder.read)
    (folder.root / "train").rename(tmp_path / "moved")
    (folder.root / "train").symlink_to(tmp_path / "moved")
    assert "train leads out of it; give the folder that it leads into" in message(folder.read)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="needs a user whom permissions bind")
def test_a_folder_that_may_not_be_listed(folder):
    folder.write()
    (folder.root / "train").chmod(0o000)
    try:
        assert "cannot be listed: Permission denied" in message(folder.read)
    finally:
        (folder.root / "train").chmod(0o755)


# --- what does not fit together -------------------------------------------------------------------------------------


def set_cell(column: str, value: str, line: int = 2):
    def change(folder):
        folder.train[line - 2][HEADER.index(column)] = value

    return change


def misspelled_columns(folder):
    folder.header[3], folder.header[10] = "Frontal", "Oedema"


def row_twice(folder):
    folder.train.append(list(folder.train[1]))


def film_twice(folder):
    folder.train.append([folder.train[1][0].replace("-small", ""), *folder.train[0][1:]])


def short_row(folder):
    folder.train[2].pop()


def missing_film(folder):
    (folder.root / "train/patient00002/study2/view1_frontal.jpg").unlink()


def folder_for_film(folder):
    missing_film(folder)
    (folder.root / "train/patient00002/study2/view1_frontal.jpg").mkdir()


def missing_patient(folder):
    shutil.rmtree(folder.root / "train/patient00003")


def file_for_patient(folder):
    missing_patient(folder)
    (folder.root / "train/patient00003").touch()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (misspelled_columns, "train.csv: column 'Frontal/Lateral' is missing. Did you mean \"Frontal\"?"),
        (misspelled_columns, "train.csv: column 'Edema' is missing. Did you mean \"Oedema\"?"),
        (row_twice, "train.csv: line 7: names train/patient00002/study1/view1_frontal.jpg, as line 3 does"),
        (film_twice, "train.csv: line 7: names train/patient00002/study1/view1_frontal.jpg, as line 3 does"),
        (short_row, "line 4: 18 fields, but the first has 19"),
        (missing_film, "line 5: there is no such file. Received: 'train/patient00002/study2/view1_frontal.jpg'"),
        (folder_for_film, "line 5: there is no such file"),
        (missing_patient, "line 6: there is no such file. Received: 'train/patient00003/study1/view1_frontal.jpg'"),
        (file_for_patient, "line 6: there is no such file"),
        (set_cell("Edema", "2"), "train.csv: line 2: Edema must be 1, 0, -1 or blank. Received: '2'"),
        (set_cell("No Finding", "-1.0"), "line 2: No Finding must be 1, 0 or blank. Received: '-1.0'"),
        (set_cell("Sex", "f"), "line 2: Sex must be Male, Female, Unknown or blank. Received: 'f'"),
        (set_cell("Age", "200"), "line 2: Age must be 0 to 150 years, or blank. Received: '200'"),
        (set_cell("Age", "old"), "line 2: Age must be 0 to 150 years, or blank. Received: 'old'"),
        (set_cell("AP/PA", "XX"), "line 2: Frontal/Lateral must be Frontal, with AP, PA, LL, RL or a blank in AP/PA"),
        (set_cell("AP/PA", "AP", line=4), "with LL, RL or a blank. Received: 'Lateral', 'AP'"),
        (set_cell("Frontal/Lateral", ""), "Received: '', 'AP'"),
    ],
)
def test_what_does_not_fit_together_is_named(folder, change, expected):
    change(folder)
    assert expected in message(folder.read)


@pytest.mark.parametrize(
    "path",
    [
        "",
        "train/../../outside/patient00001/study1/view1_frontal.jpg",
        "../CheXpert-v1.0-small/train/patient00001/study1/view1_frontal.jpg",
        "/CheXpert-v1.0-small/train/patient00001/study1/view1_frontal.jpg",
        "CheXpert-v1.0-small/train/patient00001/../patient00002/study1/view1_frontal.jpg",
        "CheXpert-v1.0-small/train/patient00001/study1/view1_frontal.jpg\0",
        "CheXpert-v1.0-small/train/patient00001/study1/view1_frontal.png",
        "CheXpert-v1.0-small/valid/patient64541/study1/view1_frontal.jpg",  # there, but in the other file
        "CheXpert-v1.0-small\\train\\patient00001\\study1\\view1_frontal.jpg",
    ],
)
def test_paths_have_one_form(folder, path):
    folder.train[0][0] = path
    text = message(folder.read)
    assert "train.csv: line 2: Path must look like CheXpert-v1.0-small/train/patient00001/study1/view1" in text
    assert f"Received: {path!r}" in text


def test_a_path_needs_no_beginning(folder):
    folder.train[0][0] = "train/patient00001/study1/view1_frontal.jpg"
    assert len(folder.read()) == 5


def test_all_problems_come_in_one_error(folder):
    for cells in folder.train:
        cells[HEADER.index("Sex")], cells[HEADER.index("Edema")] = "?", "?"
    shutil.rmtree(folder.root / "train" / "patient00002")
    with pytest.raises(ManifestError) as caught:
        folder.read()
    assert len(caught.value.problems) == 5 + 5 + 3
    assert str(caught.value).count("\n  - ") == 10 and "and 3 more" in str(caught.value)


def test_files_without_rows(folder):
    folder.train = []
    assert "no row names a film" in message(folder.read)
