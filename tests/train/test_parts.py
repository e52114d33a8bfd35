"""Which films train, choose and are reported."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from cxr_tf.config import DataSection, SplitSection
from cxr_tf.train.parts import choose_parts

CLASSES = ["none", "some"]


@pytest.fixture
def films() -> pd.DataFrame:
    """120 films of 60 patients, as the manifest of shards has them."""
    ill = np.arange(120) // 2 % 2
    return pd.DataFrame(
        {
            "source": "generated",
            "patient_id": [f"p{i // 2}" for i in range(120)],
            "study_id": [f"s{i}" for i in range(120)],
            "patient_key": np.arange(120) // 2,
            "study_key": np.arange(120),
            "mask_known": True,
            "mask": None,
            "boxes": [[(1, 1, 5, 5)] if i else [] for i in ill],
            "split": None,
            "label:none": 1.0 - ill,
            "label:some": ill.astype(float),
        }
    )


def test_patients_are_on_one_side_and_all_films_in_a_part(films):
    parts = choose_parts(films, DataSection(shards="none", split=SplitSection(folds=4)), CLASSES, seed=0)
    assert set(parts["part"]) == {"train", "validation", "test"} and len(parts) == 120
    assert (parts.groupby("patient_key")["part"].nunique() == 1).all()
    assert list(parts.columns) == ["part", "patient_key", "study_key"]


@pytest.mark.parametrize("name", ["part", "fold"])
def test_columns_of_the_manifest_may_have_our_names(films, name):
    """What a table keeps beside may be called as a column of the parts is."""
    data = DataSection(shards="none", split=SplitSection(folds=4))
    pd.testing.assert_frame_equal(
        choose_parts(films.assign(**{name: 7}), data, CLASSES, seed=0), choose_parts(films, data, CLASSES, seed=0)
    )
