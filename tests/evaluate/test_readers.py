"""Readers' labels: read strictly, and kappas that are scikit-learn's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import cohen_kappa_score

from cxr_tf.errors import CxrError
from cxr_tf.evaluate.bootstrap import bootstrap
from cxr_tf.evaluate.metrics import cohen_kappa
from cxr_tf.evaluate.readers import ReadersError, agreement, read_readers

CLASSES = ["mild", "moderate", "severe"]


def csv(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def made_up(n: int = 150, readers: str = "ABC", noise: float = 0.7, seed: int = 0) -> tuple[pd.DataFrame, dict]:
    """Grades that readers and model see through noise of their own; reader A has read the first films only."""
    rng = np.random.default_rng(seed)
    truth = rng.normal(size=n)
    patients = np.arange(n) // 2

    def grades(of: np.ndarray) -> np.ndarray:
        return np.digitize(of, [-0.5, 0.7])

    rows = []
    for reader in readers:
        seen = grades(truth + noise * rng.normal(size=n))
        rows += [(i, reader, *(seen[i] == c for c in range(3))) for i in range(100 if reader == "A" else n)]
    table = pd.DataFrame(rows, columns=["film", "reader", 0, 1, 2])
    p = np.eye(3)[grades(truth + noise * rng.normal(size=n))] * 0.6 + 0.4 / 3
    case: dict[str, Any] = {
        "films": np.arange(n),
        "studies": np.arange(n) // 2,
        "patients": patients,
        "probabilities": p / p.sum(1, keepdims=True),
        "classes": CLASSES,
        "task": "multiclass",
        "thresholds": [0.5] * 3,
        "replicates": 200,
    }
    return table, case


def said_by(table: pd.DataFrame, reader: str) -> pd.Series:
    rows = table[table["reader"] == reader].set_index("film")
    return pd.Series(rows[[0, 1, 2]].to_numpy().argmax(axis=1), index=rows.index)


# --- reading ----------------------------------------------------------------------------------------------------------


def test_labels_are_read(tmp_path: Path) -> None:
    path = csv(tmp_path / "r.csv", "film,reader,label\n3,A,mild\n3,B,severe\n5,A,moderate\n")
    table = read_readers(path, classes=CLASSES, task="multiclass", films={3, 5}, studies=set())
    assert table.columns.tolist() == ["film", "reader", 0, 1, 2]
    assert table["film"].tolist() == [3, 3, 5]
    assert table[[0, 1, 2]].to_numpy().tolist() == [[True, False, False], [False, False, True], [False, True, False]]
    path = csv(tmp_path / "s.csv", "reader,study,label\nA,7,mild; severe\nB,7,\n")
    table = read_readers(path, classes=CLASSES, task="multilabel", films={3}, studies={7})
    assert table.columns.tolist() == ["study", "reader", 0, 1, 2]
    assert table[[0, 1, 2]].to_numpy().tolist() == [[True, False, True], [False, False, False]]


def test_all_that_is_wrong_is_one_error_that_quotes_no_cell(tmp_path: Path) -> None:
    path = csv(
        tmp_path / "r.csv",
        "film,reader,label\n3,A,mild\n4,A,modrate\nQuastelhuber,A,mild\n5,,mild\n3,A,severe\n5,B,\n5,C,Zenobia\n3,D,mild;severe\n",
    )
    with pytest.raises(ReadersError) as caught:
        read_readers(path, classes=CLASSES, task="multiclass", films={3, 4, 5}, studies=set())
    assert caught.value.problems == [
        'line 3: label is no class. Did you mean "moderate"?',
        "line 4: film must be one of the numbers in predictions.csv",
        "line 5: reader is blank",
        "lines 2 and 6: one reader has the same film twice",
        "line 7: label is blank; a film that was not read has no row",
        "line 8: label is no class.",
        *caught.value.problems[6:7],
        "the classes are: mild, moderate, severe. A label is one of them",
    ]
    assert caught.value.problems[6].startswith("line 9: label is no class.")
    assert "r.csv: 8 problems" in str(caught.value)
    for word in ("Quastelhuber", "Zenobia", "modrate"):
        assert word not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("film,label\n1,mild\n", "column 'reader' is missing"),
        ("reader,label\nA,mild\n", 'one of the columns "film" and "study" must be there. Received: none'),
        ("film,study,reader,label\n1,1,A,mild\n", "Received: film and study"),
        ("film,reader,label\n", "no labels in it"),
        ("film,reader,label\n1.0,A,mild\n", "numbers in predictions.csv"),
        ("film,reader,label\n-1,A,mild\n", "numbers in predictions.csv"),
        (f"film,reader,label\n{'9' * 5000},A,mild\n", "numbers in predictions.csv"),
        ("film,reader,label\n1,A\n", "2 fields"),
    ],
)
def test_what_is_no_such_table_is_named(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(ReadersError, match=told):
        read_readers(csv(tmp_path / "r.csv", text), classes=CLASSES, task="multiclass", films={1}, studies={1})
    with pytest.raises(ReadersError, match="cannot read it"):
        read_readers(tmp_path / "none.csv", classes=CLASSES, task="multiclass", films={1}, studies={1})


# --- agreement --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ordered", [False, True])
def test_kappas_equal_scikit_learn(ordered: bool) -> None:
    table, case = made_up()
    got = json.loads(json.dumps(agreement(table, **case, ordered=ordered), allow_nan=False))
    kind = "quadratic" if ordered else None
    assert got["weights"] == (kind or "none")
    assert got["unit"] == "film"
    assert got["n"] == {"items": 150, "patients": 75, "left_out": 0}
    assert got["readers"] == {"A": 100, "B": 150, "C": 150}
    model = pd.Series(case["probabilities"].argmax(1))
    kappas = {}
    for one, other in (("A", "B"), ("A", "C"), ("B", "C")):
        a, b = said_by(table, one), said_by(table, other)
        both = a.index.intersection(b.index)
        kappas[one, other] = kappas[other, one] = cohen_kappa_score(a[both], b[both], weights=kind)
    assert [pair["readers"] for pair in got["between"]] == [["A", "B"], ["A", "C"], ["B", "C"]]
    for pair in got["between"]:
        assert pair["kappa"]["value"] == pytest.approx(kappas[tuple(pair["readers"])])
        assert pair["kappa"]["low"] < pair["kappa"]["value"] < pair["kappa"]["high"]
        assert pair["classes"] == {}
    assert got["between"][0]["kappa"]["n"] == 100
    assert got["between"][0]["kappa"]["patients"] == 50
    for entry in got["model"]:
        a = said_by(table, entry["reader"])
        kappas["", entry["reader"]] = cohen_kappa_score(model[a.index], a, weights=kind)
        assert entry["kappa"]["value"] == pytest.approx(kappas["", entry["reader"]])
    position = got["position"]
    assert position["model"]["value"] == pytest.approx(np.mean([kappas["", r] for r in "ABC"]))
    for entry in position["readers"]:
        others = [r for r in "ABC" if r != entry["reader"]]
        own = np.mean([kappas[entry["reader"], r] for r in others])
        assert entry["kappa"]["value"] == pytest.approx(own)
        assert entry["difference"]["value"] == pytest.approx(np.mean([kappas["", r] for r in others]) - own)
        assert entry["difference"]["low"] < entry["difference"]["value"] < entry["difference"]["high"]
    mean = np.mean([entry["difference"]["value"] for entry in position["readers"]])
    assert got["model_minus_readers"]["value"] == pytest.approx(mean)


def test_intervals_draw_patients() -> None:
    table, case = made_up(readers="BC")
    got = agreement(table, **case)["between"][0]["kappa"]
    cells = np.eye(9)[3 * said_by(table, "B") + said_by(table, "C")]
    expected = bootstrap(
        lambda w: {"kappa": cohen_kappa((w @ cells).reshape(-1, 3, 3))}, case["patients"], replicates=200
    )["kappa"]
    assert [got[k] for k in ("value", "low", "high")] == pytest.approx([expected.value, expected.low, expected.high])


def test_where_the_model_lies_is_said() -> None:
    table, case = made_up(n=600, readers="BCD")
    text = agreement(table, **case)["position"]["text"]
    assert "mean kappa with 3 readers" in text
    guess = np.random.default_rng(0).dirichlet(np.ones(3), 600)
    bad = agreement(table, **(case | {"probabilities": guess}))["position"]
    assert "above 0 of 3" in bad["text"]
    assert "clearly below 3 of the readers and clearly above 0; for 0" in bad["text"]
    truth = sum(pd.get_dummies(said_by(table, r)).to_numpy(float) for r in "BCD") + 1e-3 * guess
    vote = agreement(table, **(case | {"probabilities": truth / truth.sum(1, keepdims=True)}))["position"]
    assert "above 3 of 3" in vote["text"]  # the majority agrees with each more than they do with each other
    assert "clearly below 0 of the readers and clearly above 3" in vote["text"]


def test_one_reader_cannot_place_the_model() -> None:
    table, case = made_up(readers="B")
    got = agreement(table, **case)
    assert got["between"] == []
    assert got["model"][0]["kappa"]["value"] == pytest.approx(
        cohen_kappa_score(case["probabilities"].argmax(1), said_by(table, "B"))
    )
    assert got["position"]["readers"][0]["kappa"]["value"] is None
    assert got["model_minus_readers"]["value"] is None
    assert "1 reader is" in got["position"]["text"]
    assert "cannot be said" in got["position"]["text"]
    json.dumps(got, allow_nan=False)


def test_studies_are_decided_by_the_mean_of_their_films() -> None:
    _, case = made_up(n=120)
    rng = np.random.default_rng(1)
    case["probabilities"] = rng.dirichlet(np.ones(3), 120)
    case["patients"] = case["studies"]
    model = case["probabilities"].reshape(60, 2, 3).mean(1).argmax(1)
    read = np.where(rng.random(60) < 0.6, model, rng.integers(3, size=60))
    columns: dict[Any, Any] = {"study": np.arange(60), "reader": "A"}
    table = pd.DataFrame(columns | {c: read == c for c in range(3)})
    got = agreement(table, **case)
    assert (got["unit"], got["n"]["items"]) == ("study", 60)
    assert got["model"][0]["kappa"]["value"] == pytest.approx(cohen_kappa_score(model, read))


def test_several_classes_a_film_have_a_kappa_each() -> None:
    rng = np.random.default_rng(0)
    _, case = made_up(n=200)
    truth = rng.random((200, 3)) < 0.4
    said = {r: truth ^ (rng.random((200, 3)) < 0.15) for r in "AB"}
    said["A"][:, 2] = said["B"][:, 2] = False  # nobody ever says severe: nothing to agree on
    tables = []
    for reader, each in said.items():
        columns: dict[Any, Any] = {"film": np.arange(200), "reader": reader}
        tables.append(pd.DataFrame(columns | {c: each[:, c] for c in range(3)}))
    case |= {"task": "multilabel", "probabilities": np.where(truth, 0.4, 0.2), "thresholds": [0.3, 0.3, 0.3]}
    got = agreement(pd.concat(tables, ignore_index=True), **case, ordered=True)
    assert got["weights"] == "none"
    pair = got["between"][0]
    by_hand = [cohen_kappa_score(said["A"][:, c], said["B"][:, c]) for c in range(2)]
    assert [pair["classes"][name]["value"] for name in CLASSES[:2]] == pytest.approx(by_hand)
    assert pair["classes"]["severe"]["value"] is None
    assert pair["kappa"]["value"] == pytest.approx(np.mean(by_hand))
    assert "without severe" in pair["kappa"]["note"]
    for entry in got["model"]:
        for c, name in enumerate(CLASSES[:2]):
            expected = cohen_kappa_score(truth[:, c], said[entry["reader"]][:, c])
            assert entry["classes"][name]["value"] == pytest.approx(expected)
        over_two = np.mean([entry["classes"][name]["value"] for name in CLASSES[:2]])
        assert entry["kappa"]["value"] == pytest.approx(over_two)  # the same classes for model and readers
    json.dumps(got, allow_nan=False)


def test_films_that_are_not_judged_are_counted_and_left_out() -> None:
    table, case = made_up()
    for name in ("films", "studies", "patients", "probabilities"):
        case[name] = case[name][:90]
    got = agreement(table, **case)
    assert got["n"] == {"items": 90, "patients": 45, "left_out": 60}
    b, c = said_by(table, "B")[:90], said_by(table, "C")[:90]
    assert got["between"][2]["kappa"]["value"] == pytest.approx(cohen_kappa_score(b, c))
    case["films"] = case["films"] + 1000
    with pytest.raises(ReadersError, match="none of the 90 films"):
        agreement(table, **case)


def test_readers_without_a_film_in_common_are_not_measurable() -> None:
    table, case = made_up(readers="BC")
    table = table[(table["reader"] == "B") == (table["film"] < 75)]
    got = agreement(table, **case)
    assert got["between"][0]["kappa"]["value"] is None
    assert got["position"]["model"]["value"] is not None
    assert "cannot be said" in got["position"]["text"]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"task": "binary"}, "The task must be"),
        ({"probabilities": np.full((150, 3), 2.0)}, "0-1"),
        ({"patients": np.zeros(3)}, r"must be \[150\]"),
        ({"task": "multilabel", "thresholds": [0.5]}, "one threshold a class"),
        ({"replicates": 0}, "replicates"),
    ],
)
def test_what_does_not_fit_is_named(change: dict, text: str) -> None:
    table, case = made_up()
    with pytest.raises(CxrError, match=text):
        agreement(table, **(case | change))
