"""Chest-radiograph models: pre-train, fine-tune, judge, export. Research use, not a medical device.

Names are imported when they are first used, so that `cxr-tf --help` loads no TensorFlow.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# On CPUs without AVX-512 TensorFlow leaves oneDNN off, which costs a training step a quarter of its speed. TensorFlow
# reads this once, when it is imported.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")

if TYPE_CHECKING:
    from cxr_tf.data.augment import Augment
    from cxr_tf.data.pipeline import batches, pretext_batches
    from cxr_tf.data.radiograph import read_radiograph
    from cxr_tf.data.readers.siim import read_siim
    from cxr_tf.data.readers.table import read_table
    from cxr_tf.data.shards import open_shards, prepare
    from cxr_tf.data.split import split_by_patient
    from cxr_tf.data.views import MOCO_CXR, MOCO_V2, Views
    from cxr_tf.models.encoders import encoder
    from cxr_tf.models.multitask import MultiTask, multitask
    from cxr_tf.predict import Predictor
    from cxr_tf.pretrain.holes import Holes
    from cxr_tf.pretrain.inpainting import Inpainting
    from cxr_tf.pretrain.joint import Joint
    from cxr_tf.pretrain.moco import MoCo
    from cxr_tf.train.distillation import Distillation

_HOME = {
    "Augment": "cxr_tf.data.augment",
    "Distillation": "cxr_tf.train.distillation",
    "Holes": "cxr_tf.pretrain.holes",
    "Inpainting": "cxr_tf.pretrain.inpainting",
    "Joint": "cxr_tf.pretrain.joint",
    "MOCO_CXR": "cxr_tf.data.views",
    "MOCO_V2": "cxr_tf.data.views",
    "MoCo": "cxr_tf.pretrain.moco",
    "MultiTask": "cxr_tf.models.multitask",
    "Predictor": "cxr_tf.predict",
    "Views": "cxr_tf.data.views",
    "batches": "cxr_tf.data.pipeline",
    "encoder": "cxr_tf.models.encoders",
    "multitask": "cxr_tf.models.multitask",
    "open_shards": "cxr_tf.data.shards",
    "prepare": "cxr_tf.data.shards",
    "pretext_batches": "cxr_tf.data.pipeline",
    "read_radiograph": "cxr_tf.data.radiograph",
    "read_siim": "cxr_tf.data.readers.siim",
    "read_table": "cxr_tf.data.readers.table",
    "split_by_patient": "cxr_tf.data.split",
}

__all__ = [
    "MOCO_CXR",
    "MOCO_V2",
    "Augment",
    "Distillation",
    "Holes",
    "Inpainting",
    "Joint",
    "MoCo",
    "MultiTask",
    "Predictor",
    "Views",
    "batches",
    "encoder",
    "multitask",
    "open_shards",
    "prepare",
    "pretext_batches",
    "read_radiograph",
    "read_siim",
    "read_table",
    "split_by_patient",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'cxr_tf' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
