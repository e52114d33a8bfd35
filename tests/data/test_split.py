"""Splits: whole patients, balanced classes, the same for the same seed."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.model_selection import StratifiedGroupKFold

from cxr_tf.data.manifest import LABEL, labels, make_manifest
from cxr_tf.data.split import (
    SplitError,
    assign_folds,
    carve,
    check_classes,
    check_patients,
    split_by_column,
    split_by_patient,
)
from cxr_tf.errors import CxrError


def films(patients, values, **extra) -> pd.DataFrame:
    """A manifest of `patients[i]` with the labels `values[i]`."""
    rows = len(patients)
    values = np.asarray(values, float).reshape(rows, -1)
    return make_manifest(
        {
            "image": [f"/films/{i}.png" for i in range(rows)],
            "source": ["here"] * rows,
            "patient_id": [str(patient) for patient in patients],
            "study_id": [f"s{i}" for i in range(rows)],
            "view": [None] * rows,
            "sex": [None] * rows,
            "age": [math.nan] * rows,
            **{f"{LABEL}{chr(65 + c)}": values[:, c].tolist() for c in range(values.shape[1])},
            "boxes": [[] for _ in range(rows)],
            "mask": [None] * rows,
            "mask_known": [False] * rows,
            "split": [None] * rows,
            **extra,
        }
    )


def four_classes(rows: int = 400, seed: int = 0) -> pd.DataFrame:
    """As in the challenge: several films for some patients, classes 27, 47, 18 and 8 percent."""
    rng = np.random.default_rng(seed)
    patients = rng.integers(0, rows * 2 // 3, rows)
    of_patient = rng.choice(4, rows, p=[0.27, 0.47, 0.18, 0.08])
    kinds = np.where(rng.random(rows) < 0.8, of_patient[patients], rng.choice(4, rows))
    return films(patients, np.eye(4)[kinds])


def shares(df: pd.DataFrame, column: str = "split") -> pd.DataFrame:
    """Each part's share of each class's images."""
    names = [name for name in df.columns if name.startswith(LABEL)]
    return df.groupby(column)[names].sum() / df[names].sum()


@st.composite
def tables(draw):
    rows = draw(st.integers(12, 60))
    patients = draw(st.lists(st.integers(0, 30), min_size=rows, max_size=rows))
    values = draw(st.lists(st.tuples(*[st.sampled_from([0.0, 1.0, math.nan])] * 3), min_size=rows, max_size=rows))
    return films([*range(8), *patients], [(1, 0, 0)] * 8 + values)


@settings(max_examples=60, deadline=None)
@given(tables(), st.integers(0, 2**31), st.randoms())
def test_patients_stay_whole_and_the_order_of_rows_has_no_say(df, seed, random):
    fractions = {"train": 0.5, "validation": 0.25, "test": 0.25}
    first = split_by_patient(df, fractions, seed)
    check_patients(first)
    assert set(first["split"]) == set(fractions)
    order = list(range(len(df)))
    random.shuffle(order)
    again = split_by_patient(df.iloc[order], fractions, seed)
    pd.testing.assert_series_equal(again["split"].sort_index(), first["split"])
    pd.testing.assert_frame_equal(first.drop(columns="split"), df.drop(columns="split"))  # nothing else changed
    assert df["split"].isna().all()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_class_is_shared_out_as_asked(seed):
    df = four_classes()
    fractions = {"train": 0.7, "validation": 0.1, "test": 0.2}
    for name, row in shares(split_by_patient(df, fractions, seed)).iterrows():
        counts = labels(df).sum(axis=0)
        assert (np.abs(row.to_numpy() - fractions[name]) * counts <= 3).all()


def test_another_seed_is_another_split():
    df = four_classes()
    one, other = (split_by_patient(df, {"a": 0.5, "b": 0.5}, seed)["split"] for seed in (0, 1))
    assert 0.3 < (one == other).mean() < 0.7


def test_folds_are_at_least_as_even_as_scikit_learns():
    ours, theirs = [], []
    for seed in range(3):
        df = four_classes(600, seed)
        ours.append(np.abs(shares(assign_folds(df, 5, seed), "fold") - 0.2).to_numpy().max())
        reference = StratifiedGroupKFold(5, shuffle=True, random_state=seed)
        fold = np.empty(len(df), int)
        for number, (_, rows) in enumerate(reference.split(df, labels(df).argmax(axis=1), df["patient_id"])):
            fold[rows] = number
        theirs.append(np.abs(shares(df.assign(fold=fold), "fold") - 0.2).to_numpy().max())
    assert np.mean(ours) <= np.mean(theirs) + 0.005, (ours, theirs)


def test_several_labels_a_film_are_balanced_each():
    rng = np.random.default_rng(0)
    values = (rng.random((900, 6)) < [0.5, 0.3, 0.2, 0.1, 0.05, 0.02]).astype(float)
    values[:150] = math.nan
    df = assign_folds(films(rng.integers(0, 500, 900), values), 3, 0)
    counts = np.nansum(values, axis=0)
    assert (np.abs(shares(df, "fold").to_numpy() - 1 / 3) * counts <= 4).all()
    unknown = df[df["label:A"].isna()]["fold"].value_counts()
    assert unknown.max() - unknown.min() <= 6
    assert df["fold"].value_counts().max() - df["fold"].value_counts().min() <= 12


def test_without_stratification_only_numbers_of_films_count():
    df = split_by_patient(four_classes(), {"a": 0.25, "b": 0.75}, 3, stratify=False)
    assert abs((df["split"] == "a").mean() - 0.25) < 0.01
    check_patients(df)


def test_a_manifest_without_classes_can_be_split():
    df = films(range(10), np.zeros((10, 0)))
    assert (split_by_patient(df, {"a": 0.2, "b": 0.8}, 0)["split"] == "a").sum() == 2


@pytest.mark.parametrize(
    "fractions", [{}, {"a": 0.5}, {"a": 0.5, "b": 0.4}, {"a": 1.5, "b": -0.5}, {"a": 1.0, "b": 0.0}, {"a": math.nan}]
)
def test_fractions_must_be_shares(fractions):
    with pytest.raises(SplitError, match=r"above 0 and 1 in sum. Received"):
        split_by_patient(four_classes(), fractions, 0)


def test_too_few_patients_is_an_error():
    df = films([1, 1, 2, 2], [[1], [0], [1], [0]])
    with pytest.raises(SplitError, match=r"3 splits need as many patients. Received: 2 patients"):
        assign_folds(df, 3, 0)
    with pytest.raises(SplitError, match="'b' would get no patient"):
        split_by_patient(df, {"a": 0.99, "b": 0.01}, 0)
    with pytest.raises(SplitError, match=r"2 folds or more. Received: 1"):
        assign_folds(df, 1, 0)
    with pytest.raises(SplitError, match=r"seed must be 0 or more. Received: -1"):
        assign_folds(df, 2, -1)


def test_carving_takes_whole_patients_out_of_training_alone():
    df = split_by_column(assign_folds(four_classes(600), 4, 0), "fold", {"train": [0, 1, 2], "test": [3]})
    carved = carve(df, 0.15, 7)
    check_patients(carved)
    pd.testing.assert_series_equal(carved["split"] == "test", df["split"] == "test")
    of_train = carved[carved["split"] != "test"]
    counts = labels(of_train).sum(axis=0)
    assert (np.abs(shares(of_train).loc["validation"].to_numpy() - 0.15) * counts <= 3).all()
    shuffled = carve(df.sample(frac=1, random_state=0), 0.15, 7)
    pd.testing.assert_series_equal(shuffled.sort_index()["split"], carved["split"])
    with pytest.raises(SplitError, match="already"):
        carve(carved, 0.15, 7)
    with pytest.raises(SplitError, match=r"above 0 and below 1. Received: 1"):
        carve(df, 1, 7)
    with pytest.raises(SplitError, match=r"no row is in the split 'trian'. Did you mean \"train\"\?"):
        carve(df, 0.1, 7, source="trian")


def test_a_column_gives_the_split():
    part = ["train"] * 3 + ["test"] * 2 + [None]
    df = films(range(6), np.ones((6, 1)), fold=["0", "1", "2", "3", "4", None], part=part)
    assert list(split_by_column(df, "fold", {"train": [0, "1", 2.0], "test": [3]})["split"]) == [
        "train", "train", "train", "test", None, None
    ]  # fmt: skip
    assert list(split_by_column(df, "part")["split"]) == ["train"] * 3 + ["test"] * 2 + [None]
    with pytest.raises(SplitError, match=r"split 'test': no row has 7 in column 'fold'"):
        split_by_column(df, "fold", {"train": [0], "test": [7]})
    with pytest.raises(SplitError, match=r"no column 'folds'. Did you mean \"fold\"\?"):
        split_by_column(df, "folds", {"train": [0]})
    with pytest.raises(SplitError, match="no column 'Part'"):
        split_by_column(df, "Part")
    with pytest.raises(SplitError, match="splits 'train' and 'test' share values of 'fold'"):
        split_by_column(df, "fold", {"train": [0, 1], "test": [1]})


def test_a_patient_on_two_sides_is_listed_by_films_and_not_by_name():
    patients = [f"Doe^{i % 13}" for i in range(26)]
    df = films(patients, np.ones((26, 1)), fold=["0"] * 13 + ["1"] * 13)
    with pytest.raises(SplitError, match="13 patients are on two sides") as caught:
        split_by_column(df, "fold", {"train": [0], "test": [1]})
    text = str(caught.value)
    assert isinstance(caught.value, CxrError)
    assert "row 0 (0.png) in train, row 13 (13.png) in test" in text
    assert "and 3 more" in text and "Doe" not in text and "/films" not in text
    split_by_column(df, "fold", {"train": [0]})  # the others are in no split
    check_patients(df)


def test_one_kind_of_film_in_a_split_is_an_error():
    values = np.array([[1, 0], [1, 1], [1, math.nan], [0, 1]])
    df = films(range(4), values, part=["train", "train", "train", "test"])
    df = split_by_column(df, "part")
    with pytest.raises(SplitError, match=r"'train' \(3 films\).*'A': 3 films with it, 0 without, 0 unknown$"):
        check_classes(df, "train")
    check_classes(df, "train", ["B"])
    with pytest.raises(SplitError, match=r"'A': 0 films with it, 1 without.*'B': 1 films with it, 0 without"):
        check_classes(df, "test")
    with pytest.raises(SplitError, match="no row is in the split 'validation'"):
        check_classes(df, "validation")
