"""A model as an ONNX file: opset 18, "image" `[batch, S, S, 1]` in, the outputs of `export.frozen.Frozen` out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cxr_tf.errors import innermost
from cxr_tf.files import replacing
from export.about import ONNX_NAME
from export.errors import ExportError, imported
from export.frozen import Frozen

OPSET = 18


def write_onnx(model: Frozen, out: Path, said: dict[str, Any]) -> None:
    """Writes one .onnx, checked by onnx.checker, that says what it is (see `export.about`).

    Args:
        model: frozen for any number of films at a time.
        out: the file.
        said: from `export.about.about`.

    Raises:
        ExportError: when the graph cannot be converted, or is no valid ONNX.
    """
    onnx, tf2onnx = imported("onnx"), imported("tf2onnx")
    try:
        graph, _ = tf2onnx.convert.from_function(
            model.predict, input_signature=model.predict.input_signature, opset=OPSET
        )
        for value in (*graph.graph.input, *graph.graph.output):
            value.type.tensor_type.shape.dim[0].dim_param = "batch"
        onnx.helper.set_model_props(graph, {ONNX_NAME: json.dumps(said, ensure_ascii=False)})
        onnx.checker.check_model(graph, full_check=True)
    except Exception as error:  # tf2onnx raises whatever it meets
        raise ExportError(f"onnx: the graph cannot be converted: {innermost(error)}") from error
    with replacing(out) as temporary:
        onnx.save_model(graph, temporary)
