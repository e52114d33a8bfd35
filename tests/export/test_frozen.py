from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from export.about import about
from export.frozen import Frozen
from export.savedmodel import write_savedmodel

OPERATING = {
    "classes": ["a", "b", "c", "d"],
    "task": "multiclass",
    "size": 64,
    "storage_size": 80,
    "temperature": 1.7,
    "thresholds": dict.fromkeys("abcd", 0.5),
    "mask_threshold": 0.5,
}


def _ops(function) -> set[str]:
    graph = function.graph.as_graph_def()
    return {node.op for part in (graph, *graph.library.function) for node in getattr(part, "node_def", graph.node)}


@pytest.mark.parametrize("batch", [None, 2])
def test_a_frozen_model_has_no_variable_and_says_what_the_model_says(small_model, images, batch):
    model = small_model()
    frozen = Frozen(model, OPERATING, batch)
    assert not _ops(frozen.predict.get_concrete_function()) & {"ReadVariableOp", "VarHandleOp"}
    made, raw = frozen.predict(images[:2]), model(images[:2], training=False)
    np.testing.assert_allclose(made["logits"], raw["logits"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(made["probabilities"], tf.nn.softmax(raw["logits"] / 1.7), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(made["mask"], tf.sigmoid(raw["mask_logits"]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("head", ["both", "segmentation"])
def test_what_a_savedmodel_is_asked_most_reads_no_variable(small_model, tmp_path, head):
    model = small_model(classification=head == "both")
    operating = OPERATING if head == "both" else {**OPERATING, "classes": []}
    write_savedmodel(model, tmp_path / "1", about(operating, name="tiny", heads=model.heads))
    loaded = tf.saved_model.load(str(tmp_path / "1"))
    for name, signature in loaded.signatures.items():
        read = "ReadVariableOp" in _ops(signature)
        assert read == (name in ("features", "explain")), name
    weights = sum(np.prod(variable.shape) for variable in model.variables)
    size = sum(
        file.stat().st_size
        for file in (tmp_path / "1").rglob("*")
        if file.is_file() and file.parent.name != "assets.extra"
    )
    assert size < 4 * 2 * weights + 1e6  # once as constants, and once at most as variables
