"""What every exported form carries of its model, and how it is read back, without TensorFlow.

    SavedModel   assets/cxr_tf.json
    .tflite      metadata "cxr_tf.json" of the flatbuffer
    .onnx        metadata_props "cxr_tf"

A JSON object: all of the run's `operating.json` (classes, task, size, storage_size, temperature, thresholds,
mask_threshold, ...), and

    notice          "research use, not a medical device"
    name            of the experiment
    heads           "classification" and/or "segmentation"
    calibrated      true: probabilities are divided by the temperature already, inside the graph
    preprocessing   what `cxr_tf.preprocess` does to a film before the graph
    versions        of cxr-tf, keras and tensorflow

It says how many films and patients the thresholds were chosen on, and nothing else of any patient.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from cxr_tf.operating import wrong_keys
from export.errors import ExportError, imported

NOTICE = "research use, not a medical device"
LITERT_NAME, ONNX_NAME = "cxr_tf.json", "cxr_tf"

_HEADS = {"logits": "classification", "mask_logits": "segmentation"}
_PREPROCESSING = {
    "polarity": "bones are white",
    "steps": [
        "shrink until the longer side is storage_size, round to 8 bits",
        "fit the longer side to size",
        "pad to a square with black, film in the center",
    ],
    "filter": "triangle, antialiased",
    "range": [0, 255],
}


def about(operating: dict[str, Any], *, name: str, heads: Sequence[str]) -> dict[str, Any]:
    """What every form of a run carries (see the module's text).

    Args:
        operating: the run's `operating.json`.
        name: of the experiment.
        heads: the model's: "logits" and/or "mask_logits".

    Example:
        >>> about(run.operating(), name=run.experiment.name, heads=model.heads)["heads"]  # doctest: +SKIP
        ['classification', 'segmentation']
    """
    return {
        "notice": NOTICE,
        "name": name,
        **operating,
        "heads": [_HEADS[head] for head in heads],
        "calibrated": True,
        "preprocessing": _PREPROCESSING,
        "versions": {package: metadata.version(package) for package in ("cxr-tf", "keras", "tensorflow")},
    }


def read_about(path: str | Path) -> dict[str, Any]:
    """Reads what an exported form carries; loads no TensorFlow.

    Args:
        path: folder of a SavedModel, a .tflite or a .onnx.

    Raises:
        ExportError: when it is no form of ours, or damaged, or a package that reads it is missing.

    Example:
        >>> read_about("export/litert/int8.tflite")["classes"]  # doctest: +SKIP
        ['No finding', 'Pneumonia']
    """
    path = Path(path)
    try:
        if path.is_dir():
            text = _of_savedmodel(path)
        elif path.suffix.lower() == ".tflite":
            text = litert_about(path.read_bytes(), str(path))
        elif path.suffix.lower() == ".onnx":
            text = onnx_about(path.read_bytes(), str(path))
        else:
            raise ExportError(f"{path}: is no exported form: the folder of a SavedModel, a .tflite or a .onnx is.")
    except OSError as error:
        raise ExportError(f"{path}: cannot be read ({error.strerror or error}).") from error
    except UnicodeDecodeError as error:
        raise ExportError(f"{path}: what it says of itself is damaged ({error}). Export again.") from error
    if text is None:
        raise ExportError(f"{path}: is not one of ours: it says nothing of its classes. `cxr-tf export` makes them.")
    try:
        said = json.loads(text)
    except ValueError as error:
        raise ExportError(f"{path}: what it says of itself is damaged ({error}). Export again.") from error
    if wrong := wrong_keys(said) or [key for key in ("notice", "name") if not isinstance(said.get(key), str)]:
        raise ExportError(
            f"{path}: is damaged, or of another version: {', '.join(wrong)} is missing or makes no sense. Export again."
        )
    return said


def _of_savedmodel(folder: Path) -> str | None:
    if not (folder / "saved_model.pb").is_file():
        raise ExportError(f"{folder}: is no SavedModel: it has no saved_model.pb.")
    said = folder / "assets" / "cxr_tf.json"
    return said.read_text(encoding="utf-8") if said.is_file() else None


def litert_about(content: bytes, where: str = "the model") -> str | None:
    """The text of a LiteRT model's metadata "cxr_tf.json", or None.

    Args:
        content: of the .tflite file.
        where: names it in errors.

    Raises:
        ExportError: when the file is cut off or no LiteRT model.
    """
    schema = imported("ai_edge_litert.schema_py_generated")
    if content[4:8] != b"TFL3":
        raise ExportError(f"{where}: is no LiteRT model. `cxr-tf export RUN --format litert` writes some.")
    try:
        model = schema.Model.GetRootAs(content, 0)
        buffers = [model.Buffers(i) for i in range(model.BuffersLength())]
        # A flatbuffer's data come last, so that what is left of one that was cut off can look whole.
        texts = [buffer.DataAsNumpy() if buffer.DataLength() else b"" for buffer in buffers]
        for i in range(model.MetadataLength()):
            entry = model.Metadata(i)
            if entry.Name() == LITERT_NAME.encode():
                return bytes(texts[entry.Buffer()]).decode("utf-8")
    except (struct.error, ValueError, IndexError, TypeError, AttributeError) as error:
        raise ExportError(f"{where}: is cut off, or no LiteRT model. Export it again.") from error
    return None


def onnx_about(content: bytes, where: str = "the model") -> str | None:
    """The text of an ONNX model's metadata_props "cxr_tf", or None.

    Read off the file's outermost fields, so that neither the graph nor the package onnx is loaded for it.

    Args:
        content: of the .onnx file.
        where: names it in errors.

    Raises:
        ExportError: when the file is cut off or no ONNX model.
    """
    try:
        for number, value in _fields(memoryview(content)):
            if number == 14:  # ModelProto.metadata_props, of StringStringEntryProto
                entry = dict(_fields(value))
                if bytes(entry[1]) == ONNX_NAME.encode():
                    return bytes(entry[2]).decode("utf-8")
    except (ValueError, IndexError, KeyError, TypeError) as error:
        raise ExportError(f"{where}: is cut off, or no ONNX model. Export it again.") from error
    return None


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Fields of a protobuf message that have a length: number and content."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(message):
        number, kind = divmod(varint(), 8)
        if kind == 0:
            varint()
            continue
        start, at = at, at + {1: 8, 5: 4}.get(kind, 0)
        if kind == 2:
            length = varint()
            start, at = at, at + length
        if at > len(message) or kind not in (1, 2, 5):
            raise ValueError("no protobuf message")
        if kind == 2:
            yield number, message[start:at]


def litert_with_about(content: bytes, said: dict[str, Any]) -> bytes:
    """A LiteRT model that carries `said` as its metadata "cxr_tf.json".

    Args:
        content: of a .tflite file.
        said: from `about`.

    Returns:
        The new content.
    """
    schema = imported("ai_edge_litert.schema_py_generated")
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(content, 0))
    text = schema.BufferT(data=json.dumps(said, indent=2, ensure_ascii=False).encode("utf-8"))
    model.buffers.append(text)
    kept = [entry for entry in model.metadata or [] if entry.name not in (LITERT_NAME, LITERT_NAME.encode())]
    model.metadata = [*kept, schema.MetadataT(name=LITERT_NAME, buffer=len(model.buffers) - 1)]
    return litert_packed(model)


def litert_packed(model: Any) -> bytes:
    """Content of a .tflite from an unpacked `ModelT`, its weights aligned to 16 bytes as the runtime's kernels want."""
    flatbuffers = imported("flatbuffers")
    schema = imported("ai_edge_litert.schema_py_generated")
    for buffer in model.buffers:
        buffer.Pack = _aligned(schema, buffer)
    builder = flatbuffers.Builder(65536)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def _aligned(schema: Any, buffer: Any) -> Any:
    """`BufferT.Pack` that keeps the schema's `force_align: 16`, which the generated one forgets."""

    def pack(builder: Any) -> int:
        vector = None
        if buffer.data is not None:
            data = bytes(buffer.data)
            builder.StartVector(1, len(data), 16)
            builder.head = head = builder.Head() - len(data)
            builder.Bytes[head : head + len(data)] = data
            vector = builder.EndVector()
        schema.BufferStart(builder)
        if vector is not None:
            schema.BufferAddData(builder, vector)
        schema.BufferAddOffset(builder, buffer.offset)
        schema.BufferAddSize(builder, buffer.size)
        return schema.BufferEnd(builder)

    return pack
