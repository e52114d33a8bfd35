"""What every test shares: a quiet TensorFlow and, where it is there, the real data set."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest


@pytest.fixture(scope="session")
def cxr_data() -> Path:
    """The real radiographs (docs/data.md says how to rebuild them); a test that needs them skips without."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "cxr"
    root = Path(os.environ.get("CXR_DATA", beside))
    if not (root / "metadata.csv").is_file():
        pytest.skip("the real radiographs are not here: set CXR_DATA to their folder")
    return root
