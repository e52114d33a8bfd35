"""Criteria and thresholds -> may it be deployed: pass, fail, or not measurable, one by one."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from cxr_tf.config import Section, load_list

DEFAULT = Path(__file__).with_name("readiness.toml")

Outcome = Literal["pass", "fail", "not measurable"]


class Criterion(Section):
    """What one figure must reach."""

    title: str = Field(description="what passing means, in plain words")
    figure: str = Field(description="where the figure stands in metrics.json: shortcuts.lungs_blanked.kept")
    at_least: float | None = Field(None, description="the lowest that passes")
    at_most: float | None = Field(None, description="the highest that passes")
    by: Literal["value", "low", "high"] = Field("value", description="the figure, or an end of its interval")
    why: str = Field(description="where the threshold comes from")
    before: str | None = Field(
        None, description="where the same figure stands as it was before the run's own correction; decides nothing"
    )

    @model_validator(mode="after")
    def _one_threshold(self) -> Criterion:
        if (self.at_least is None) == (self.at_most is None):
            raise ValueError("give one of `at_least` and `at_most`")
        return self

    @property
    def threshold(self) -> str:
        """In words: "at least 0.8 (lower end)"."""
        ends = {"value": "", "low": " (lower end of the interval)", "high": " (upper end of the interval)"}
        bound = f"at most {self.at_most:g}" if self.at_least is None else f"at least {self.at_least:g}"
        return bound + ends[self.by]


@dataclass(frozen=True)
class Verdict:
    """A criterion held against a model.

    Attributes:
        criterion: which.
        outcome: "pass", "fail" or "not measurable".
        estimate: the figure as {"value", "low", "high", "note", ...}; None where there is none.
        reason: why it is not measurable; "" otherwise.
        before: how the figure would have done before the run's own correction, where the criterion names one.
    """

    criterion: Criterion
    outcome: Outcome
    estimate: Mapping[str, Any] | None
    reason: str = ""
    before: Verdict | None = None


def load_criteria(path: str | os.PathLike[str] | None = None) -> list[Criterion]:
    """Reads a file of criteria; by default the one that comes with the package.

    Raises:
        ConfigError: for a missing file, bad TOML, an unknown key, or a value of the wrong type.

    Example:
        >>> [c.title for c in load_criteria()][:2]
        ['Enough films of every class were tested', 'Tells the classes apart']
    """
    return load_list(path or DEFAULT, "criterion", Criterion)


def readiness(metrics: Mapping[str, Any], criteria: Sequence[Criterion]) -> list[Verdict]:
    """Holds a model's figures against criteria.

    Args:
        metrics: `evaluation/metrics.json`.
        criteria: from `load_criteria`.

    Returns:
        A verdict a criterion, in their order. A figure that is not there, is not measurable, or lacks the interval that
        the criterion goes by, makes "not measurable", which is not a pass.

    Example:
        >>> verdicts = readiness(metrics, load_criteria())  # doctest: +SKIP
        >>> all(verdict.outcome == "pass" for verdict in verdicts)  # doctest: +SKIP
        False
    """
    verdicts = []
    for criterion in criteria:
        verdict = _held(criterion, _figure(metrics, criterion.figure))
        if criterion.before is not None:
            verdict = replace(verdict, before=_held(criterion, _figure(metrics, criterion.before)))
        verdicts.append(verdict)
    return verdicts


def _figure(metrics: Mapping[str, Any], path: str) -> Mapping[str, Any] | None:
    found: Any = metrics
    for name in path.split("."):
        if not isinstance(found, Mapping) or name not in found:
            return None
        found = found[name]
    if isinstance(found, int | float) and not isinstance(found, bool):
        return {"value": found, "low": None, "high": None, "note": ""}
    return found if isinstance(found, Mapping) and "value" in found else None


def _held(criterion: Criterion, estimate: Mapping[str, Any] | None) -> Verdict:
    if estimate is None:
        return Verdict(criterion, "not measurable", None, "was not measured")
    number = estimate[criterion.by]
    # A figure that should have an interval and has none is no pass; a count needs none.
    if number is None or (estimate["low"] is None and not isinstance(estimate["value"], int)):
        reason = estimate.get("note") or ("it has no interval" if estimate["value"] is not None else "not measurable")
        return Verdict(criterion, "not measurable", estimate, reason)
    if criterion.at_least is not None:
        passed = number >= criterion.at_least
    else:
        assert criterion.at_most is not None
        passed = number <= criterion.at_most
    return Verdict(criterion, "pass" if passed else "fail", estimate)


def readiness_json(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Verdicts as JSON.

        {"ready": bool,
         "criteria": [{"title", "figure", "threshold", "by", "why", "outcome", "reason", "estimate",
                       "before": {"figure", "outcome", "reason", "estimate"} or null, ...}]}

    Whether a model is ready does not depend on any "before".
    """
    return {
        "ready": all(verdict.outcome == "pass" for verdict in verdicts),
        "criteria": [
            {
                **verdict.criterion.model_dump(),
                "threshold": verdict.criterion.threshold,
                **_outcome(verdict),
                "before": verdict.before and {"figure": verdict.criterion.before, **_outcome(verdict.before)},
            }
            for verdict in verdicts
        ],
    }


def _outcome(verdict: Verdict) -> dict[str, Any]:
    return {
        "outcome": verdict.outcome,
        "reason": verdict.reason,
        "estimate": dict(verdict.estimate) if verdict.estimate else None,
    }
