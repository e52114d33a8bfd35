"""A model as a LiteRT (.tflite) file: float32, float16, dynamic range or int8; builtin ops alone, signature "predict".

    float32   the graph as it is
    float16   weights in half precision, computed in float32
    dynamic   weights of convolutions and dense layers in 8 bits, activations quantized as they come
    int8      weights and activations in 8 bits (Jacob et al., "Quantization and Training of Neural Networks for
              Efficient Integer-Arithmetic-Only Inference", CVPR 2018), ranges calibrated on training films

All take and give float32. In int8 both ends stay in float, for a few hundred bytes: standardization and the first
convolution with its activation, whose rounding errors everything behind them inherits; and each head's last layer with
what follows it (temperature, softmax, sigmoid), where 8 bits clip the logits at what calibration saw and leave
probabilities 256 values. docs/export.md has what that was measured to save.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from cxr_tf.errors import innermost
from cxr_tf.files import replacing
from export.about import litert_packed, litert_with_about
from export.errors import ExportError, imported
from export.forms import Process
from export.frozen import Frozen

KINDS = ("float32", "float16", "dynamic", "int8")
SIGNATURE = "predict"

_WEIGHTED = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED")
_BEFORE = ("MUL", "ADD", "SUB", "PAD")  # the first convolution: standardization
_BEHIND = ("HARD_SWISH", "LOGISTIC", "MUL", "RELU", "RELU6")  # it: activations that are not fused into it


def write_litert(
    freeze: Callable[[int | None], Frozen], kind: str, out: Path, said: dict[str, Any], films: np.ndarray
) -> None:
    """Writes one .tflite that says what it is (see `export.about`).

    Any number of films at a time goes in where the runtime bears that; else its input is fixed to one film.

    Args:
        freeze: batch (None for any) -> the model, frozen for that.
        kind: one of `KINDS`.
        out: the file.
        said: from `export.about.about`.
        films: float32 `[n, S, S, 1]`, 0-255: training films that int8 is calibrated on; others do not look at them.

    Raises:
        ExportError: when the graph cannot be converted to builtin ops.
    """
    with replacing(out) as temporary:
        for batch in (None, 1):
            content = convert(freeze(batch), kind, films)
            temporary.write_bytes(litert_with_about(content, said))
            if batch or bears_batches(temporary, said["size"]):
                break


def bears_batches(path: Path, size: int) -> bool:
    """Whether the runtime takes two films at a time, and says of each what it says of it alone.

    It is tried in a process of its own: where the runtime gives up, it ends the process.

    Args:
        path: of a .tflite that says what it is.
        size: side of its input in pixels.
    """
    films = np.random.default_rng(0).uniform(0, 255, (2, size, size, 1)).astype(np.float32)
    try:
        process = Process(path.name, path, films[:1])
        try:
            alone = [process(films[i : i + 1]) for i in range(2)]
            both = process(films)
        finally:
            process.close()
    except ExportError:
        return False
    return all(
        np.allclose(both[name], np.concatenate([one[name] for one in alone]), rtol=1e-4, atol=1e-4) for name in both
    )


def convert(model: Frozen, kind: str, films: np.ndarray) -> bytes:
    """A frozen model -> content of a .tflite (see `write_litert`).

    Raises:
        ExportError: when it needs more than builtin ops.
    """
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the converter's own use of what TensorFlow deprecates
        tf.saved_model.save(model, folder, signatures={SIGNATURE: model.predict})
        converter = tf.lite.TFLiteConverter.from_saved_model(folder, signature_keys=[SIGNATURE])
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
        if kind != "float32":
            converter.optimizations = [tf.lite.Optimize.DEFAULT]
        if kind == "float16":
            converter.target_spec.supported_types = [tf.float16]
        try:
            content = _int8(converter, films) if kind == "int8" else converter.convert()
        except Exception as error:  # the converter's own error is no public name
            lines = [line.strip() for line in str(error).splitlines()]
            ops = [line for line in lines if line.startswith(("Custom ops: ", "Flex ops: "))]
            told = f"needs more than builtin ops. {ops[0]}" if ops else innermost(error)
            raise ExportError(f"litert-{kind}: the graph cannot be converted: {told}") from error
    if custom := custom_ops(content):
        raise ExportError(f"litert-{kind}: needs {', '.join(custom)}, which LiteRT's builtin ops do not have.")
    return content


def custom_ops(content: bytes) -> list[str]:
    """Names of the ops of a .tflite that are not builtin (Flex ops begin with "Flex"); empty for all of ours."""
    schema = imported("ai_edge_litert.schema_py_generated")
    model = schema.Model.GetRootAs(content, 0)
    codes = [model.OperatorCodes(i) for i in range(model.OperatorCodesLength())]
    return sorted({(code.CustomCode() or b"?").decode() for code in codes if _builtin(schema, code) == "CUSTOM"})


def _int8(converter: Any, films: np.ndarray) -> bytes:
    """Calibrates on films, then quantizes all but the two ends (see the module's text)."""
    converter.representative_dataset = lambda: ({"image": films[i : i + 1]} for i in range(len(films)))
    options = tf.lite.experimental.QuantizationDebugOptions()
    debugger = tf.lite.experimental.QuantizationDebugger(converter=converter, debug_options=options)
    debugger.calibrated_model = _finite(debugger.calibrated_model)
    options.denylisted_nodes = _in_float(debugger.calibrated_model)
    return debugger.get_nondebug_quantized_model()


def _finite(content: bytes) -> bytes:
    """A calibrated model in which padding by -infinity, as keras-hub does before a max-pool, has its input's range.

    A pooling window always holds a pixel too, so that the least value of the range does as well; 8 bits over a range
    that begins at -3e38 hold nothing, and the runtime ends the process.
    """
    schema = imported("ai_edge_litert.schema_py_generated")
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(content, 0))
    tensors = model.subgraphs[0].tensors
    for op in model.subgraphs[0].operators:
        seen = tensors[op.outputs[0]].quantization
        if seen is not None and seen.min is not None and seen.min.min(initial=0.0) < -1e30:
            seen.min = tensors[op.inputs[0]].quantization.min.copy()
    return litert_packed(model)


def _in_float(content: bytes) -> list[str]:
    """Names of the tensors whose ops stay in float: up to the first convolution, and from each head's last layer on."""
    schema = imported("ai_edge_litert.schema_py_generated")
    root = schema.Model.GetRootAs(content, 0)
    names = [_builtin(schema, root.OperatorCodes(i)) for i in range(root.OperatorCodesLength())]
    graph = schema.ModelT.InitFromObj(root).subgraphs[0]
    ops = [(names[op.opcodeIndex], list(op.inputs), op.outputs[0]) for op in graph.operators]
    made_by = {output: (kind, inputs) for kind, inputs, output in ops}
    chosen = set()
    for at in graph.outputs:
        while at in made_by:
            chosen.add(at)
            kind, inputs = made_by[at]
            if kind in _WEIGHTED:
                break
            at = inputs[0]
    at = graph.inputs[0]
    accepted: tuple[str, ...] = (*_BEFORE, *_WEIGHTED)
    for kind, inputs, output in ops:
        if at in inputs:
            if kind not in accepted:
                break
            at = output
            chosen.add(at)
            accepted = _BEHIND if kind in _WEIGHTED else accepted
    return sorted(graph.tensors[at].name.decode() for at in chosen)


def _builtin(schema: Any, code: Any) -> str:
    """Name of an operator code; old writers put numbers below 127 into another field."""
    number = max(code.BuiltinCode(), code.DeprecatedBuiltinCode())
    return next(name for name, value in vars(schema.BuiltinOperator).items() if value == number)
