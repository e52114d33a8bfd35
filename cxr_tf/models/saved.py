"""Keras files, loaded in safe mode, with errors that say what is wrong with them."""

from __future__ import annotations

import zipfile
from pathlib import Path

import keras

from cxr_tf.models.layers import ModelError


def read_keras(path: Path, what: str) -> keras.Model:
    """Loads a `.keras` file in safe mode: nothing in it is executed.

    Args:
        path: the file.
        what: what it should be, for errors: "an encoder saved by us (encoder.keras)".

    Raises:
        ModelError: when it is missing, damaged, or no Keras model.
    """
    if path.suffix != ".keras" or path.is_dir():
        raise ModelError(f"{path}: is no .keras file; {what} is expected.")
    if not path.is_file():
        raise ModelError(f"{path}: does not exist; {what} is expected.")
    if not zipfile.is_zipfile(path):
        raise ModelError(f"{path}: is cut off, or no Keras model; {what} is expected.")
    try:
        return keras.saving.load_model(path, compile=False, safe_mode=True)
    except Exception as error:  # a broken h5, an unknown layer, code: each its own bare exception
        raise ModelError(f"{path}: cannot be read as a Keras model: {str(error).splitlines()[0]}") from error
