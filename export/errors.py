"""The error of exports, and the packages that they stand on."""

from __future__ import annotations

import importlib
from typing import Any

from cxr_tf.errors import CxrError

_INSTALLED_BY = {
    "ai_edge_litert": "ai-edge-litert",
    "flatbuffers": "flatbuffers",
    "onnx": "onnx",
    "onnxruntime": "onnxruntime",
    "tensorflow": "tensorflow",
    "tf2onnx": "tf2onnx",
}


class ExportError(CxrError):
    """An export that cannot be written or read, or does not do what its model does."""


def imported(module: str) -> Any:
    """Imports a module of a package that may not be there.

    Raises:
        ExportError: when it is not; the text has the line that installs it.

    Example:
        >>> imported("onnx").load_model("model.onnx")  # doctest: +SKIP
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = (error.name or module).partition(".")[0]
        package = _INSTALLED_BY.get(missing, missing)
        raise ExportError(f"{package} is needed and not installed: pip install {package}") from error
