"""Readiness: thresholds held against figures, and files of criteria."""

from __future__ import annotations

import pytest

from cxr_tf.config import ConfigError
from cxr_tf.evaluate.readiness import Criterion, load_criteria, readiness, readiness_json


def estimate(value, low=None, high=None, note=""):
    return {"value": value, "low": low, "high": high, "level": 0.95, "note": note}


def criterion(**settings):
    return Criterion.model_validate({"title": "t", "figure": "image.macro.auroc", "why": "w", **settings})


METRICS = {"image": {"macro": {"auroc": estimate(0.85, 0.79, 0.9), "kappa": estimate(0.8)}}, "n": {"images": 120}}


@pytest.mark.parametrize(
    ("settings", "outcome"),
    [
        ({"at_least": 0.8}, "pass"),
        ({"at_least": 0.85}, "pass"),
        ({"at_least": 0.8, "by": "low"}, "fail"),
        ({"at_least": 0.79, "by": "low"}, "pass"),
        ({"at_most": 0.9, "by": "high"}, "pass"),
        ({"at_most": 0.85}, "pass"),
        ({"at_most": 0.849}, "fail"),
        ({"at_least": 100.0, "figure": "n.images"}, "pass"),
        ({"at_least": 121.0, "figure": "n.images"}, "fail"),
        ({"at_least": 100.0, "figure": "n.images", "by": "low"}, "not measurable"),
        ({"at_least": 0.5, "figure": "segmentation.dice"}, "not measurable"),
        ({"at_least": 0.5, "figure": "image.macro"}, "not measurable"),
        ({"at_least": 0.5, "figure": "image.macro.kappa"}, "not measurable"),  # it has no interval
    ],
)
def test_outcomes(settings, outcome):
    (verdict,) = readiness(METRICS, [criterion(**settings)])
    assert verdict.outcome == outcome
    assert bool(verdict.reason) == (outcome == "not measurable")


def test_what_is_not_measurable_says_why_and_is_no_pass():
    metrics = {"image": {"macro": {"auroc": estimate(None, note="one outcome only")}}}
    verdicts = readiness(metrics, [criterion(at_least=0.5)])
    assert verdicts[0].reason == "one outcome only"
    assert not readiness_json(verdicts)["ready"]
    assert readiness_json(readiness(METRICS, [criterion(at_least=0.5)]))["ready"]


def test_what_a_figure_was_before_is_shown_and_decides_nothing():
    before = estimate(0.2, 0.15, 0.3)
    metrics = {"ece": estimate(0.05, 0.03, 0.08), "calibration": {"before": {"ece": before}}}
    asked = criterion(figure="ece", at_most=0.1, before="calibration.before.ece")
    made = readiness_json(readiness(metrics, [asked]))
    assert made["ready"]
    (found,) = made["criteria"]
    assert (found["outcome"], found["estimate"]["value"]) == ("pass", 0.05)
    assert found["before"] == {
        "figure": "calibration.before.ece",
        "outcome": "fail",
        "reason": "",
        "estimate": before,
    }
    absent = readiness_json(readiness({"ece": metrics["ece"]}, [asked]))
    assert absent["ready"] and absent["criteria"][0]["before"]["outcome"] == "not measurable"
    assert readiness_json(readiness(METRICS, [criterion(at_least=0.5)]))["criteria"][0]["before"] is None


def test_the_criteria_that_come_with_the_package():
    criteria = load_criteria()
    assert len({c.title for c in criteria}) == len(criteria) > 10
    assert all(len(c.why) > 40 for c in criteria)
    assert all(verdict.outcome == "not measurable" for verdict in readiness({}, criteria))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"takes \[\[criterion\]\] tables alone. Received: nothing"),
        ("[criterion]\ntitle = 'x'", "tables alone"),
        ("[[criteria]]\ntitle = 'x'", "tables alone. Received: criteria"),
        ("[[criterion]]\ntitle='t'\nfigure='f'\nwhy='w'", "number 1: .*give one of `at_least` and `at_most`"),
        ("[[criterion]]\ntitle='t'\nfigure='f'\nwhy='w'\nat_lest=1", "number 1: unknown key `at_lest`.*at_least"),
        ("[[criterion]]\ntitle='t'\nfigure='f'\nwhy='w'\nat_least='x'", "`at_least` takes a number.*Received: 'x'"),
        ("[[criterion]]\ntitle='t'\nfigure='f'\nwhy='w'\nat_least=1.0\nby='mean'", '`by` takes "value" or "low"'),
        ("[[criterion", "not valid TOML"),
    ],
)
def test_files_that_are_none(tmp_path, text, message):
    file = tmp_path / "criteria.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_criteria(file)
    with pytest.raises(ConfigError, match="no such"):
        load_criteria(tmp_path / "absent.toml")
