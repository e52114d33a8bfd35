"""What a model says of itself: `operating.json` of a run and its copies in exported forms. Loads nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _whole(most: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and 0 < value <= most


def _names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


_KEYS: dict[str, Callable[[Any], bool]] = {
    "classes": _names,
    "task": lambda value: value in ("multiclass", "multilabel"),
    "size": _whole(8192),
    "storage_size": _whole(65536),
    "temperature": lambda value: _number(value) and value > 0,
    "thresholds": lambda value: isinstance(value, dict) and all(_number(each) for each in value.values()),
    "mask_threshold": lambda value: _number(value) and 0 < value < 1,
}


def wrong_keys(operating: Any) -> list[str]:
    """The keys that an `operating.json` lacks, or whose values make no sense; empty when it can be used.

    Args:
        operating: what was read from it.

    Example:
        >>> wrong_keys({"classes": ["a"], "size": "large"})
        ['task', 'size', 'storage_size', 'temperature', 'thresholds', 'mask_threshold']
    """
    if not isinstance(operating, dict):
        return list(_KEYS)
    return [key for key, fits in _KEYS.items() if key not in operating or not fits(operating[key])]
