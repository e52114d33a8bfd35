"""Subgroups: figures are those of the group's films; differences are found where they are, and only there."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cxr_tf.errors import CxrError
from cxr_tf.evaluate import metrics as m
from cxr_tf.evaluate.bootstrap import bootstrap
from cxr_tf.evaluate.calibration import calibration_error, calibration_error_of
from cxr_tf.evaluate.metrics import MaskScores, Ranked
from cxr_tf.evaluate.subgroups import age_bands, subgroups

CLASSES = ["none", "pneumonia", "effusion"]


def made_up(n: int = 600, seed: int = 0, worse: str = "") -> tuple[pd.DataFrame, dict[str, Any]]:
    """Films of n // 2 patients or so; of the sex `worse`, the scores are noise."""
    rng = np.random.default_rng(seed)
    patients = np.sort(rng.integers(n // 2, size=n))
    sex = rng.choice(["M", "F"], n)[patients]
    films = pd.DataFrame(
        {
            "view": pd.Series(rng.choice(["PA", "AP", ""], n, p=[0.6, 0.3, 0.1]), dtype=object).replace("", None),
            "sex": pd.Series(sex, dtype=object),
            "age": rng.uniform(18, 90, n)[patients],
            "source": pd.Series(["here"] * n, dtype=object),
        }
    )
    labels = np.eye(3)[rng.integers(3, size=n)]
    logits = rng.normal(size=(n, 3)) + np.where(sex == worse, 0, 2)[:, None] * labels
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    case = {
        "labels": labels,
        "probabilities": probabilities,
        "classes": CLASSES,
        "patients": patients,
        "task": "multiclass",
        "thresholds": [0.3, 0.4, 0.5],
        "replicates": 200,
    }
    return films, case


def test_figures_are_those_of_the_films_of_the_group() -> None:
    films, case = made_up()
    got = json.loads(json.dumps(subgroups(films, **case), allow_nan=False))
    assert list(got["groups"]) == ["view", "sex", "age", "source"]
    view = got["groups"]["view"]
    assert list(view) == ["PA", "AP"]  # by their number of films
    assert got["unknown"]["view"] == films["view"].isna().sum()
    kept = {}
    for name, group in view.items():
        rows = (films["view"] == name).to_numpy()
        p, y = case["probabilities"][rows], case["labels"][rows]
        called = p >= case["thresholds"]
        kept[name] = {
            "auroc": m.auroc(p, y).mean(),
            "sensitivity": np.mean([called[y[:, c] == 1, c].mean() for c in range(3)]),
            "specificity": np.mean([1 - called[y[:, c] == 0, c].mean() for c in range(3)]),
            "ece": calibration_error(p, y, "multiclass"),
        }
        assert list(group["figures"]) == list(kept[name])
        for figure, value in kept[name].items():
            estimate = group["figures"][figure]
            assert estimate["value"] == pytest.approx(value), figure
            assert estimate["low"] < estimate["high"]
            assert (estimate["n"], estimate["patients"]) == (group["films"], group["patients"])
        assert group["films"] == rows.sum()
        assert group["patients"] == len(np.unique(case["patients"][rows]))
    for figure, value in kept["PA"].items():  # films of unknown view are not in the rest
        difference = view["PA"]["differences"][figure]
        assert difference["value"] == pytest.approx(value - kept["AP"][figure])
        assert view["AP"]["differences"][figure]["low"] == pytest.approx(-difference["high"])
        assert difference["n"] == sum(group["films"] for group in view.values())


def test_group_and_rest_are_of_the_same_draws_of_patients() -> None:
    """Views differ within a patient: the interval is that of a bootstrap of the difference, made by hand."""
    films, case = made_up(300)
    got = subgroups(films, **case)["groups"]["view"]["PA"]["differences"]["auroc"]
    sides = [(films["view"] == name).to_numpy() for name in ("PA", "AP")]

    def statistic(weights: np.ndarray) -> dict[str, np.ndarray]:
        areas = [
            np.mean(
                [
                    m.auroc_of(*Ranked(case["probabilities"][:, c], case["labels"][:, c]).counts(weights * side))
                    for c in range(3)
                ],
                axis=0,
            )
            for side in sides
        ]
        return {"difference": areas[0] - areas[1]}

    expected = bootstrap(statistic, case["patients"], replicates=200)["difference"]
    assert [got[k] for k in ("value", "low", "high")] == pytest.approx([expected.value, expected.low, expected.high])


def test_a_group_that_the_model_fails_is_found_and_said() -> None:
    films, case = made_up(worse="F")
    found = subgroups(films, **case)
    women = found["groups"]["sex"]["F"]
    assert women["differences"]["auroc"]["high"] < -0.2
    assert "AUROC is 0." in women["text"]
    assert "lower than on the others" in women["text"]
    assert women["text"].startswith("Sex F: AUROC")
    men = found["groups"]["sex"]["M"]
    assert "higher than on the others" in men["text"]
    assert found["beyond_zero"] >= 3  # the mirrored difference of two groups is counted once
    assert f"{found['beyond_zero']} do" in found["text"]
    gap, drop = found["largest_gap"], women["differences"]["auroc"]
    assert [gap[k] for k in ("value", "low", "high")] == pytest.approx([-drop[k] for k in ("value", "high", "low")])
    assert gap["note"].startswith("of sex F")


def test_what_could_have_gone_unseen_is_half_the_interval() -> None:
    films, case = made_up(seed=1)
    found = subgroups(films, **case)
    group = found["groups"]["sex"]["F"]
    difference = group["differences"]["auroc"]
    assert difference["low"] < 0 < difference["high"]
    assert f"AUROC (up to about {(difference['high'] - difference['low']) / 2:.2f})" in group["text"]
    # View and sex have two groups each, age three with films, source one: 1 + 1 + 3 comparisons of four figures.
    assert list(found["groups"]["age"]) == ["18-39", "40-64", "65+"]
    assert found["comparisons"] == 20
    assert "20 differences" in found["text"]
    assert "about 1 of these" in found["text"]


def test_one_group_has_nothing_to_be_compared_with() -> None:
    films, case = made_up(200)
    group = subgroups(films, **case)["groups"]["source"]["here"]
    assert group["differences"] == {}
    assert "nothing to compare" in group["text"]
    assert group["figures"]["auroc"]["value"] == pytest.approx(m.auroc(case["probabilities"], case["labels"]).mean())


def test_too_few_to_say() -> None:
    films, case = made_up(600)
    few = case["patients"] < 15
    films["source"] = np.where(few, "small", "large")
    found = json.loads(json.dumps(subgroups(films, **case), allow_nan=False))
    small = found["groups"]["source"]["small"]
    assert small["figures"]["ece"]["value"] is None
    assert "too few" in small["figures"]["ece"]["note"]
    assert small["figures"]["ece"]["patients"] == len(np.unique(case["patients"][few]))
    assert "Too few to say for" in small["text"]
    assert "20 patients are needed" in small["text"]
    large = found["groups"]["source"]["large"]
    assert large["figures"]["ece"]["value"] is not None
    assert large["differences"]["ece"]["value"] is None  # the rest is too small
    assert "too few to say: source large, source small" in found["largest_gap"]["note"]
    films, case = made_up(30)
    nothing = json.loads(json.dumps(subgroups(films, **case), allow_nan=False))
    assert (nothing["comparisons"], nothing["largest_gap"]["value"]) == (0, None)
    assert "No group is large enough" in nothing["text"]


def test_a_class_that_is_rare_in_a_group_is_left_out_on_both_sides() -> None:
    films, case = made_up(800, seed=2)
    y, women = case["labels"], (films["sex"] == "F").to_numpy()
    keep = ~(women & (y[:, 2] == 1))
    films, women = films[keep], women[keep]
    for name in ("labels", "probabilities", "patients"):
        case[name] = case[name][keep]
    areas = {
        sex: m.auroc(case["probabilities"][rows], case["labels"][rows]) for sex, rows in (("F", women), ("M", ~women))
    }
    groups = subgroups(films, **case)["groups"]["sex"]
    assert groups["M"]["figures"]["auroc"]["value"] == pytest.approx(areas["M"].mean())
    assert groups["F"]["figures"]["auroc"]["value"] == pytest.approx(areas["F"][:2].mean())
    assert "without effusion: too few" in groups["F"]["figures"]["auroc"]["note"]
    for sex, sign in (("F", 1), ("M", -1)):
        difference = groups[sex]["differences"]["auroc"]
        assert difference["value"] == pytest.approx(sign * (areas["F"][:2] - areas["M"][:2]).mean())
        assert "without effusion" in difference["note"]


def test_multi_label_with_unknown_labels_and_masks() -> None:
    films, case = made_up(500)
    rng = np.random.default_rng(3)
    y = (rng.random((500, 3)) < 0.4) * 1.0
    p = np.clip(0.4 * y + 0.6 * rng.random(y.shape), 0, 1)
    y[rng.random(y.shape) < 0.2] = np.nan
    dice = np.where(rng.random(500) < 0.5, rng.random(500), np.nan)
    nan = np.full(500, np.nan)
    masks = MaskScores(dice, dice, nan, ~np.isnan(dice), np.zeros(500, bool), nan, nan, nan)
    case |= {"labels": y, "probabilities": p, "task": "multilabel", "masks": masks}
    women = (films["sex"] == "F").to_numpy()
    figures = subgroups(films, **case)["groups"]["sex"]["F"]["figures"]
    assert figures["auroc"]["value"] == pytest.approx(m.auroc(p[women], y[women]).mean())
    assert figures["ece"]["value"] == pytest.approx(calibration_error(p[women], y[women], "multilabel"))
    assert figures["dice"]["value"] == pytest.approx(np.nanmean(dice[women]))
    assert figures["dice"]["n"] == (~np.isnan(dice[women])).sum()
    alone = subgroups(films, **(case | {"probabilities": None}))["groups"]["sex"]["F"]
    assert list(alone["figures"]) == ["dice"]
    assert alone["figures"]["dice"] == figures["dice"]


def test_age_bands() -> None:
    ages = np.array([0, 17.9, 18, 39.99, 40, 64.5, 65, 104, np.nan])
    assert age_bands(ages).tolist() == ["0-17"] * 2 + ["18-39"] * 2 + ["40-64"] * 2 + ["65+"] * 2 + [""]


@given(st.integers(0, 2**32 - 1), st.sampled_from(["multiclass", "multilabel"]))
@settings(max_examples=40, deadline=None)
def test_weighted_calibration_error_is_that_of_repeated_films(seed: int, task: Any) -> None:
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.ones(3), 30)
    y = np.eye(3)[rng.integers(3, size=30)]
    y[rng.random(30) < 0.2] = np.nan
    weights = rng.integers(0, 4, (2, 30))
    got = calibration_error_of(p, y, task)(weights.astype(np.float64))
    for row, times in enumerate(weights):
        rows = np.repeat(np.arange(30), times)
        expected = calibration_error(p[rows], y[rows], task) if len(rows) else np.nan
        assert got[row] == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"labels": np.ones((3, 3))}, "one entry a film"),
        ({"patients": np.zeros(3)}, "one entry a film"),
        ({"thresholds": [0.5]}, "one threshold a class"),
        ({"task": "binary"}, "The task must be"),
        ({"replicates": 0}, "replicates"),
    ],
)
def test_what_cannot_be_judged_is_named(change: dict, text: str) -> None:
    films, case = made_up(60)
    with pytest.raises(CxrError, match=text):
        subgroups(films, **(case | change))
    with pytest.raises(CxrError, match="Missing: sex"):
        subgroups(films.drop(columns="sex"), **case)


@pytest.mark.slow
def test_differences_that_are_not_there_are_rarely_claimed() -> None:
    """200 draws of patients whose sex makes no difference: about 5 % of the intervals leave out 0."""
    claimed = []
    for seed in range(200):
        films, case = made_up(300, seed=seed)
        difference = subgroups(films[["view", "sex", "age", "source"]].assign(view=None, age=np.nan), **case)
        difference = difference["groups"]["sex"]["F"]["differences"]["auroc"]
        claimed.append(difference["low"] > 0 or difference["high"] < 0)
    assert (
        0.005 <= np.mean(claimed) <= 0.12
    )  # binomial: .05 ± 4 standard errors, and a little for the percentile method
