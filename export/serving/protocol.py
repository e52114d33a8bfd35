"""TensorFlow Serving's messages, as far as predicting needs them, and tensors in them.

The message types are built from their descriptors instead of being imported from tensorflow-serving-api, which imports
all of TensorFlow for them: seconds and more than a gigabyte, for a client that sends pictures. Fields that nobody here
sets are left out; protobuf skips them when it reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format

from cxr_tf.errors import CxrError

PREDICT = "/tensorflow.serving.PredictionService/Predict"

# tensorflow/core/framework/{types,tensor_shape,tensor}.proto, tensorflow_serving/apis/{model,predict,prediction_log}
# .proto: names of messages and numbers of fields are theirs.
_MESSAGES = """
name: "serving.proto" package: "tensorflow" syntax: "proto3"
message_type {
  name: "TensorShapeProto"
  nested_type { name: "Dim" field { name: "size" number: 1 label: LABEL_OPTIONAL type: TYPE_INT64 } }
  field {
    name: "dim" number: 2 label: LABEL_REPEATED type: TYPE_MESSAGE type_name: ".tensorflow.TensorShapeProto.Dim"
  }
}
message_type {
  name: "TensorProto"
  field { name: "dtype" number: 1 label: LABEL_OPTIONAL type: TYPE_INT32 }
  field {
    name: "tensor_shape" number: 2 label: LABEL_OPTIONAL type: TYPE_MESSAGE type_name: ".tensorflow.TensorShapeProto"
  }
  field { name: "tensor_content" number: 4 label: LABEL_OPTIONAL type: TYPE_BYTES }
  field { name: "float_val" number: 5 label: LABEL_REPEATED type: TYPE_FLOAT }
  field { name: "int_val" number: 7 label: LABEL_REPEATED type: TYPE_INT32 }
  field { name: "string_val" number: 8 label: LABEL_REPEATED type: TYPE_BYTES }
}
message_type {
  name: "ModelSpec"
  field { name: "name" number: 1 label: LABEL_OPTIONAL type: TYPE_STRING }
  field { name: "signature_name" number: 3 label: LABEL_OPTIONAL type: TYPE_STRING }
}
message_type {
  name: "PredictRequest"
  nested_type {
    name: "InputsEntry" options { map_entry: true }
    field { name: "key" number: 1 label: LABEL_OPTIONAL type: TYPE_STRING }
    field {
      name: "value" number: 2 label: LABEL_OPTIONAL type: TYPE_MESSAGE type_name: ".tensorflow.TensorProto"
    }
  }
  field {
    name: "model_spec" number: 1 label: LABEL_OPTIONAL type: TYPE_MESSAGE type_name: ".tensorflow.ModelSpec"
  }
  field {
    name: "inputs" number: 2 label: LABEL_REPEATED type: TYPE_MESSAGE
    type_name: ".tensorflow.PredictRequest.InputsEntry"
  }
}
message_type {
  name: "PredictResponse"
  nested_type {
    name: "OutputsEntry" options { map_entry: true }
    field { name: "key" number: 1 label: LABEL_OPTIONAL type: TYPE_STRING }
    field {
      name: "value" number: 2 label: LABEL_OPTIONAL type: TYPE_MESSAGE type_name: ".tensorflow.TensorProto"
    }
  }
  field {
    name: "outputs" number: 1 label: LABEL_REPEATED type: TYPE_MESSAGE
    type_name: ".tensorflow.PredictResponse.OutputsEntry"
  }
}
message_type {
  name: "PredictLog"
  field {
    name: "request" number: 1 label: LABEL_OPTIONAL type: TYPE_MESSAGE type_name: ".tensorflow.PredictRequest"
  }
}
message_type {
  name: "PredictionLog"
  field {
    name: "predict_log" number: 6 label: LABEL_OPTIONAL type: TYPE_MESSAGE type_name: ".tensorflow.PredictLog"
  }
}
"""

_FLOAT, _INT32, _STRING = 1, 3, 7  # of enum DataType


class ProtocolError(CxrError):
    """An answer that is no tensor of a kind that our models give."""


@cache
def message(name: str) -> Any:
    """A message class: "PredictRequest", "PredictResponse", "PredictionLog" or one of their parts."""
    return message_factory.GetMessageClass(_pool().FindMessageTypeByName(f"tensorflow.{name}"))


def predict_request(model: str, signature: str, inputs: Mapping[str, Any]) -> Any:
    """A PredictRequest.

    Args:
        model: name of the served model; empty in warm-up records, which belong to the model beside them.
        signature: of that model.
        inputs: name of an input -> TensorProto.

    Example:
        >>> request = predict_request("cxr", "predict", {"image": to_tensor(np.zeros((1, 64, 64, 1), np.float32))})
        >>> request.model_spec.signature_name
        'predict'
    """
    request = message("PredictRequest")()
    request.model_spec.name = model
    request.model_spec.signature_name = signature
    for name, tensor in inputs.items():
        request.inputs[name].CopyFrom(tensor)
    return request


def to_tensor(values: np.ndarray | list[bytes]) -> Any:
    """A TensorProto of float32 values of any shape, or of byte strings `[n]`."""
    tensor = message("TensorProto")()
    if isinstance(values, list):
        tensor.dtype = _STRING
        tensor.string_val.extend(values)
        _shape(tensor, (len(values),))
    else:
        tensor.dtype = _FLOAT
        tensor.tensor_content = np.ascontiguousarray(values, "<f4").tobytes()
        _shape(tensor, values.shape)
    return tensor


def constant_tensor(value: float | bytes, shape: tuple[int, ...]) -> Any:
    """A TensorProto of `shape` that is `value` all over, in a few bytes: whoever reads it repeats the last value."""
    tensor = message("TensorProto")()
    if isinstance(value, bytes):
        tensor.dtype = _STRING
        tensor.string_val.append(value)
    else:
        tensor.dtype = _FLOAT
        tensor.float_val.append(value)
    _shape(tensor, shape)
    return tensor


def from_tensor(tensor: Any) -> np.ndarray:
    """The values of a TensorProto: float32, int32, or an object array of bytes.

    Raises:
        ProtocolError: for another type, or values that do not fill the shape.
    """
    shape = tuple(int(dim.size) for dim in tensor.tensor_shape.dim)
    fields = {_FLOAT: ("float_val", np.float32), _INT32: ("int_val", np.int32), _STRING: ("string_val", np.object_)}
    if tensor.dtype not in fields:
        raise ProtocolError(f"the answer holds a tensor of a type that is none of ours. Received: {tensor.dtype}")
    field, dtype = fields[tensor.dtype]
    size = int(np.prod(shape, dtype=np.int64))
    if tensor.tensor_content and tensor.dtype != _STRING:
        values: np.ndarray = np.frombuffer(tensor.tensor_content, np.dtype(dtype).newbyteorder("<")).astype(dtype)
    else:
        values = np.array(list(getattr(tensor, field)), dtype)
        if 0 < len(values) < size:
            values = np.concatenate([values, np.repeat(values[-1:], size - len(values))])
    if min(shape, default=1) < 0 or len(values) != size:
        raise ProtocolError(f"the answer holds a damaged tensor: {len(values)} values for the shape {list(shape)}.")
    return values.reshape(shape)


def _shape(tensor: Any, shape: tuple[int, ...]) -> None:
    for size in shape:
        tensor.tensor_shape.dim.add().size = size


@cache
def _pool() -> Any:
    pool = descriptor_pool.DescriptorPool()  # of its own: TensorFlow puts the same names into the default one
    pool.Add(text_format.Parse(_MESSAGES, descriptor_pb2.FileDescriptorProto()))
    return pool
