"""The client against servers of our own, which run the real SavedModel through TensorFlow's C++ loader.

`Loaded` is what TensorFlow Serving is made of: `LoadSavedModel` and `Session::Run`, reached through TensorFlow's C
interface, with nothing of Python's loader in between. The servers speak through tensorflow-serving-api's own messages.
"""

from __future__ import annotations

import ctypes
import json
import math
import subprocess
import sys
import textwrap
import threading
import time
from concurrent import futures
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import grpc
import keras
import numpy as np
import pydicom
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis.extra.numpy import array_shapes, arrays
from PIL import Image
from pydicom.dataset import FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid
from tensorflow.core.protobuf import meta_graph_pb2
from tensorflow_serving.apis import (
    predict_pb2,
    prediction_log_pb2,
    prediction_service_pb2_grpc,
)

import cxr_tf
from cxr_tf import preprocess
from export.about import about
from export.savedmodel import write_savedmodel
from export.serving import protocol
from export.serving.client import Client, ServingError, main
from export.serving.config import write_serving_config
from export.serving.warmup import BATCH_SIZES, PLACE

SIZE, STORAGE = 64, 96
CLASSES = ["Negative for Pneumonia", "Typical", "Übrige"]
OPERATING = {
    "classes": CLASSES,
    "task": "multiclass",
    "size": SIZE,
    "storage_size": STORAGE,
    "temperature": 1.7,
    "thresholds": dict.fromkeys(CLASSES, 0.5),
    "mask_threshold": 0.5,
}
NAME, PATIENT = "SECRET^JANE", "MRN-77-SECRET"


# --- TensorFlow's C++ loader ------------------------------------------------------------------------------------------


_TYPES = {1: np.float32, 3: np.int32}
_STRING, _STRING_BYTES = 7, 24
_RETURN_POINTERS = (
    "TF_NewStatus",
    "TF_NewSessionOptions",
    "TF_NewGraph",
    "TF_LoadSessionFromSavedModel",
    "TF_GraphOperationByName",
    "TF_AllocateTensor",
    "TF_TensorData",
    "TF_StringGetDataPointer",
)


class SessionError(Exception):
    def __init__(self, code: int, text: str):
        super().__init__(text)
        self.code = code


class _Output(ctypes.Structure):
    _fields_ = (("operation", ctypes.c_void_p), ("index", ctypes.c_int))


class _Buffer(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("length", ctypes.c_size_t), ("free", ctypes.c_void_p))


class Loaded:
    """A SavedModel: `TF_LoadSessionFromSavedModel` calls C++'s `LoadSavedModel`, `TF_SessionRun` its session."""

    def __init__(self, folder: Path):
        self.c = c = ctypes.CDLL(str(Path(tf.__file__).parent / "libtensorflow_cc.so.2"))
        for name in _RETURN_POINTERS:
            getattr(c, name).restype = ctypes.c_void_p
        c.TF_NewBuffer.restype = ctypes.POINTER(_Buffer)
        c.TF_Message.restype = ctypes.c_char_p
        c.TF_Dim.restype = ctypes.c_int64
        c.TF_StringGetSize.restype = ctypes.c_size_t
        self.status = ctypes.c_void_p(c.TF_NewStatus())
        self.graph = ctypes.c_void_p(c.TF_NewGraph())
        meta = c.TF_NewBuffer()
        tags = (ctypes.c_char_p * 1)(b"serve")
        options = ctypes.c_void_p(c.TF_NewSessionOptions())
        self.session = ctypes.c_void_p(
            c.TF_LoadSessionFromSavedModel(options, None, str(folder).encode(), tags, 1, self.graph, meta, self.status)
        )
        self._check()
        text = ctypes.string_at(meta.contents.data, meta.contents.length)
        self.signatures = meta_graph_pb2.MetaGraphDef.FromString(text).signature_def
        self.lock = threading.Lock()  # there is one status

    def __call__(self, signature: str, **inputs: np.ndarray | list[bytes]) -> dict[str, np.ndarray]:
        definition = self.signatures[signature]
        names = list(definition.outputs)
        with self.lock:
            fed = (_Output * len(inputs))(*(self._place(definition.inputs[name].name) for name in inputs))
            fetched = (_Output * len(names))(*(self._place(definition.outputs[name].name) for name in names))
            values = (ctypes.c_void_p * len(inputs))(*map(self._tensor, inputs.values()))
            results = (ctypes.c_void_p * len(names))()
            self.c.TF_SessionRun(
                self.session, None, fed, values, len(inputs), fetched, results, len(names), None, 0, None, self.status
            )
            for value in values:
                self.c.TF_DeleteTensor(ctypes.c_void_p(value))
            self._check()
            return {name: self._array(result) for name, result in zip(names, results, strict=True)}

    def _check(self) -> None:
        if code := self.c.TF_GetCode(self.status):
            raise SessionError(code, self.c.TF_Message(self.status).decode(errors="replace"))

    def _place(self, name: str) -> _Output:
        operation, _, index = name.partition(":")
        found = self.c.TF_GraphOperationByName(self.graph, operation.encode())
        assert found, name
        return _Output(found, int(index))

    def _tensor(self, values: np.ndarray | list[bytes]) -> int:
        strings = isinstance(values, list)
        shape = (len(values),) if strings else values.shape
        dims = (ctypes.c_int64 * len(shape))(*shape)
        size = _STRING_BYTES * len(values) if strings else values.nbytes
        kind = _STRING if strings else {np.dtype(t): k for k, t in _TYPES.items()}[values.dtype]
        tensor = self.c.TF_AllocateTensor(kind, dims, len(shape), ctypes.c_size_t(size))
        data = self.c.TF_TensorData(ctypes.c_void_p(tensor))
        if not strings:
            ctypes.memmove(data, np.ascontiguousarray(values).ctypes.data, size)
            return tensor
        for i, text in enumerate(values):
            place = ctypes.c_void_p(data + _STRING_BYTES * i)
            self.c.TF_StringInit(place)
            self.c.TF_StringCopy(place, text, ctypes.c_size_t(len(text)))
        return tensor

    def _array(self, result: int) -> np.ndarray:
        tensor = ctypes.c_void_p(result)
        shape = tuple(self.c.TF_Dim(tensor, i) for i in range(self.c.TF_NumDims(tensor)))
        data, count = self.c.TF_TensorData(tensor), int(np.prod(shape))
        kind = self.c.TF_TensorType(tensor)
        if kind == _STRING:
            places = [ctypes.c_void_p(data + _STRING_BYTES * i) for i in range(count)]
            texts = [ctypes.string_at(self.c.TF_StringGetDataPointer(p), self.c.TF_StringGetSize(p)) for p in places]
            array = np.array(texts, object).reshape(shape)
        else:
            dtype = np.dtype(_TYPES[kind])
            array = np.frombuffer(ctypes.string_at(data, count * dtype.itemsize), dtype).reshape(shape)
        self.c.TF_DeleteTensor(tensor)
        return array


# --- servers of our own -----------------------------------------------------------------------------------------------


class Model:
    """What a server serves, and how it misbehaves: seconds that it takes, and codes that it answers with first."""

    def __init__(self, loaded: Loaded):
        self.loaded = loaded
        self.as_fields = True
        self.reset()

    def reset(self) -> None:
        self.delay, self.errors = 0.0, []
        self.seen: list[tuple[str, bytes, int]] = []  # signature, request, films in it

    def predict(self, name: str, signature: str, inputs: dict, raw: bytes) -> dict[str, np.ndarray]:
        """As tensorflow_serving/servables/tensorflow/predict_util.cc does it."""
        self.seen.append((signature, raw, len(next(iter(inputs.values()), ()))))
        if signature == "predict":
            if self.errors:
                raise SessionError(*self.errors.pop(0))
            time.sleep(self.delay)
        if name != "cxr":
            raise SessionError(5, f"Servable not found for request: Latest({name})")
        signature = signature or "serving_default"
        if signature not in self.loaded.signatures:
            raise SessionError(9, f'Serving signature key "{signature}" not found.')
        expected = set(self.loaded.signatures[signature].inputs)
        if set(inputs) != expected:
            raise SessionError(3, f"input size does not match signature: {set(inputs)} != {expected}")
        return self.loaded(signature, **inputs)


CODES = {code.value[0]: code for code in grpc.StatusCode}
HTTP = {3: 400, 4: 504, 5: 404, 8: 503, 9: 412, 14: 503}


class Grpc(prediction_service_pb2_grpc.PredictionServiceServicer):
    def __init__(self, model: Model):
        self.model = model

    def Predict(self, request, context):  # noqa: N802
        inputs = {}
        for name, tensor in request.inputs.items():
            array = tf.make_ndarray(tensor)
            inputs[name] = array.reshape(-1).tolist() if array.dtype == object else array
        spec = request.model_spec
        try:
            outputs = self.model.predict(spec.name, spec.signature_name, inputs, request.SerializeToString())
        except SessionError as error:
            context.abort(CODES[error.code], str(error))
        answer = predict_pb2.PredictResponse()
        for name, array in outputs.items():
            answer.outputs[name].CopyFrom(self._tensor(array))
        return answer

    def _tensor(self, array):
        made = tf.make_tensor_proto(array)
        if self.model.as_fields and made.tensor_content:  # Tensor::AsProtoField, TensorFlow Serving's way
            made.tensor_content = b""
            field = made.float_val if array.dtype == np.float32 else made.int_val
            field.extend(array.reshape(-1).tolist())
        return made


class Rest(BaseHTTPRequestHandler):
    """The columnar form of tensorflow_serving/util/json_tensor.cc."""

    model: Model

    def do_POST(self):
        raw = self.rfile.read(int(self.headers["Content-Length"]))
        try:
            asked = json.loads(raw)
            name = self.path.removeprefix("/v1/models/").removesuffix(":predict")
            inputs = {
                key: [text.encode() for text in value] if key == "request" else np.array(value, np.float32)
                for key, value in asked["inputs"].items()
            }
            outputs = self.model.predict(name, asked["signature_name"], inputs, raw)
            said = {key: self._plain(array) for key, array in outputs.items()}
            self._answer(200, {"outputs": said if len(said) > 1 else next(iter(said.values()))})
        except SessionError as error:
            self._answer(HTTP[error.code], {"error": str(error)})
        except OSError:
            pass  # the client has gone

    def _plain(self, array):
        return np.vectorize(lambda text: text.decode())(array).tolist() if array.dtype == object else array.tolist()

    def _answer(self, code, body):
        content = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    keras.utils.set_random_seed(0)
    model = cxr_tf.multitask("small_resnet", (SIZE, SIZE, 1), classes=CLASSES, decoder_channels=(8, 8, 8, 8, 8))
    out = tmp_path_factory.mktemp("dist")
    write_savedmodel(model, out / "savedmodel" / "1", about(OPERATING, name="tiny", heads=model.heads))
    write_serving_config(out)
    return out


@pytest.fixture(scope="module")
def loaded(dist):
    return Loaded(dist / "savedmodel" / "1")


@pytest.fixture(scope="module")
def _servers(loaded):
    model = Model(loaded)
    unlimited = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    grpc_server = grpc.server(futures.ThreadPoolExecutor(4), options=unlimited)
    prediction_service_pb2_grpc.add_PredictionServiceServicer_to_server(Grpc(model), grpc_server)
    port = grpc_server.add_insecure_port("127.0.0.1:0")
    grpc_server.start()
    http_server = ThreadingHTTPServer(("127.0.0.1", 0), type("Front", (Rest,), {"model": model}))
    threading.Thread(target=http_server.serve_forever, daemon=True).start()
    yield model, {"grpc": f"grpc://127.0.0.1:{port}", "rest": f"http://127.0.0.1:{http_server.server_port}"}
    grpc_server.stop(None)
    http_server.shutdown()
    http_server.server_close()


@pytest.fixture(params=["grpc", "rest"])
def served(request, _servers):
    model, addresses = _servers
    model.reset()
    return model, addresses[request.param]


def _film(seed: int = 0, shape: tuple[int, int] = (150, 120)) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 5), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize(shape[::-1], Image.Resampling.BICUBIC))


def _dicom(path: Path, pixels: np.ndarray) -> None:
    dataset = pydicom.Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.1.1"
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    dataset.PatientName, dataset.PatientID, dataset.PatientBirthDate = NAME, PATIENT, "19600229"
    dataset.Rows, dataset.Columns = pixels.shape
    dataset.BitsAllocated = dataset.BitsStored = 8
    dataset.HighBit, dataset.PixelRepresentation, dataset.SamplesPerPixel = 7, 0, 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.WindowCenter, dataset.WindowWidth = 128, 256
    dataset.PixelData = pixels.tobytes()
    dataset.save_as(path, enforce_file_format=True)


@pytest.fixture
def folder(tmp_path):
    """Three films, two files that are none, and a text."""
    _dicom(tmp_path / "a.dcm", _film(1))
    Image.fromarray(_film(2)).save(tmp_path / "b.png")
    Image.fromarray(_film(3)).save(tmp_path / "c.jpg", quality=95)
    (tmp_path / "cut.png").write_bytes((tmp_path / "b.png").read_bytes()[:400])
    (tmp_path / "d.dcm").write_bytes(b"\0" * 128 + b"DICM" + b"\xff" * 40)
    (tmp_path / "notes.txt").write_text("no film")
    return tmp_path


# --- what the server's half does --------------------------------------------------------------------------------------


def _records(folder: Path):
    for record in tf.data.TFRecordDataset(str(folder / PLACE)):
        yield prediction_log_pb2.PredictionLog.FromString(record.numpy()).predict_log.request


@pytest.mark.parametrize("entry", ["savedmodel", "serving/batched"])
def test_warm_up_records_replay_through_the_loader(dist, entry):
    model = Loaded(dist / entry / "1")
    seen = set()
    for request in _records(dist / entry / "1"):
        inputs = {}
        for name, tensor in request.inputs.items():
            array = tf.make_ndarray(tensor)
            inputs[name] = array.reshape(-1).tolist() if array.dtype == object else array
        signature = request.model_spec.signature_name
        outputs = model(signature, **inputs)
        (count,) = {len(array) for array in outputs.values()}
        seen.add((signature, count))
    assert seen == {(signature, size) for signature in model.signatures for size in BATCH_SIZES} - {
        ("__saved_model_init_op", size) for size in BATCH_SIZES
    }
    assert (dist / entry / "1" / PLACE).stat().st_size < 100_000


def test_the_batched_model_has_no_signature_that_decodes_files(dist, loaded):
    batched = Loaded(dist / "serving" / "batched" / "1")
    assert set(batched.signatures) - {"__saved_model_init_op"} == {"predict", "about"}
    image = np.random.default_rng(5).uniform(0, 255, (3, SIZE, SIZE, 1)).astype(np.float32)
    ours, theirs = batched("predict", image=image), loaded("predict", image=image)
    assert set(ours) == set(theirs)
    np.testing.assert_allclose(ours["mask"], theirs["mask"], atol=1e-6)


def _png(pixels: np.ndarray) -> bytes:
    return tf.io.encode_png(pixels).numpy()


GOOD = _png(np.full((9, 9, 1), 90, np.uint8))
NO_PIXELS = GOOD[:16] + bytes(8) + GOOD[24:]


BROKEN = {  # and what TensorFlow says of it
    "nothing": (b"", r"no such file at position\] \[1\]"),
    "a text": (b"no image", r"no such file at position\] \[1\]"),
    "half a file": (GOOD[:30], r"no such file at position\] \[1\]"),
    "no pixels": (NO_PIXELS, "(?i)png"),
    "damaged pixels": (GOOD[:50] + b"\xff" * 4 + GOOD[54:], "(?i)png"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_film_in_a_batch_is_an_invalid_argument(loaded, kind):
    bad, words = BROKEN[kind]
    with pytest.raises(SessionError, match=words) as error:
        loaded("serving_default", image_bytes=[GOOD, bad, GOOD])
    assert error.value.code == 3
    assert len(loaded("serving_default", image_bytes=[GOOD])["probabilities"]) == 1  # nobody else's request


def test_one_pixel_and_color_are_films_too(loaded):
    one = _png(np.full((1, 1, 1), 90, np.uint8))
    color = _png(np.full((9, 9, 3), 90, np.uint8))
    answer = loaded("serving_default", image_bytes=[one, color, GOOD])
    assert answer["content_box"].tolist() == [[0, 0, SIZE, SIZE]] * 3
    np.testing.assert_allclose(answer["probabilities"], answer["probabilities"][[2, 2, 2]], atol=1e-5)


@pytest.mark.parametrize("signature", ["predict", "features", "explain"])
@pytest.mark.parametrize("shape", [(2, SIZE, SIZE, 3), (2, 32, 32, 1), (SIZE, SIZE, 1), (0, SIZE, SIZE, 3)])
def test_an_image_of_another_shape_is_an_invalid_argument(loaded, signature, shape):
    with pytest.raises(SessionError) as error:
        loaded(signature, image=np.zeros(shape, np.float32))
    assert error.value.code == 3


@pytest.mark.parametrize("signature", ["serving_default", "predict", "explain"])
def test_no_film_is_an_invalid_argument(loaded, signature):
    inputs = {"image_bytes": []} if signature == "serving_default" else {"image": np.zeros((0, SIZE, SIZE, 1), "f4")}
    with pytest.raises(SessionError, match="takes one") as error:
        loaded(signature, **inputs)
    assert error.value.code == 3


def test_texts_are_no_intensities(loaded):
    with pytest.raises(SessionError) as error:
        loaded("predict", image=[b"x"])
    assert error.value.code == 3


# --- the client -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_fields", [True, False])
def test_films_are_answered_as_the_model_answers_them(served, as_fields):
    model, address = served
    model.as_fields = as_fields
    client = Client(address, batch_size=2)
    films = [_film(i, shape) for i, shape in enumerate([(150, 120), (40, 90), (64, 64)])]
    answers = client(films)
    assert client.about["classes"] == CLASSES
    images, boxes = [], []
    for film in films:
        stored = preprocess.to_storage(film, STORAGE)
        images.append(preprocess.to_input(stored, SIZE))
        boxes.append(preprocess.content_box(*stored.shape, SIZE))
    expected = model.loaded("predict", image=np.stack(images))
    for i, answer in enumerate(answers):
        assert list(answer.probabilities) == CLASSES
        np.testing.assert_allclose(list(answer.probabilities.values()), expected["probabilities"][i], atol=1e-4)
        mask = preprocess.mask_to_original(expected["mask"][i], boxes[i], *films[i].shape)
        np.testing.assert_allclose(answer.mask, mask, atol=1e-3)
    assert [count for signature, _, count in model.seen if signature == "predict"] == [2, 1]


def _run(capsys, *arguments: object) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_broken_films_are_named_and_the_others_go_on(served, folder, capsys):
    _, address = served
    code, out, err = _run(capsys, folder, "--server", address, "--json", "--batch-size", 2, "--masks", folder / "m")
    said = json.loads(out)
    assert code == 1
    assert [Path(row["film"]).name for row in said["films"]] == ["a.dcm", "b.png", "c.jpg"]
    assert [Path(row["film"]).name for row in said["failed"]] == ["cut.png", "d.dcm"]
    assert "truncated" in said["failed"][0]["error"]
    assert err.count(str(folder / "cut.png")) == 1
    for row in said["films"]:
        assert sum(row[name] for name in CLASSES) == pytest.approx(1, abs=1e-4)
    masks = sorted((folder / "m").iterdir())
    assert [mask.name for mask in masks] == ["a.mask.png", "b.mask.png", "c.mask.png"]
    assert np.asarray(Image.open(masks[0])).shape == (150, 120)
    assert set(np.unique(np.asarray(Image.open(masks[0])))) <= {0, 255}
    assert said["films"][0]["mask_area"] == pytest.approx((np.asarray(Image.open(masks[0])) > 0).mean())
    assert "Traceback" not in err
    code, _, err = _run(capsys, folder / "a.dcm", "--server", address, "--masks", folder / "m")
    assert code == 1 and "holds files already. Give another folder with --masks" in err


def test_the_table_has_a_line_for_each_film(served, folder, capsys):
    code, out, _ = _run(capsys, folder / "a.dcm", folder / "c.jpg", "--server", served[1])
    assert code == 0
    lines = out.splitlines()
    assert lines[0].split("  ")[0] == "film"
    assert "Übrige" in lines[0]
    assert len(lines) == 3
    assert len({len(line) for line in lines}) == 1


def test_nothing_but_pixels_leaves(served, folder, capsys):
    model, address = served
    _run(capsys, folder / "a.dcm", "--server", address)
    image = preprocess.to_input(preprocess.to_storage(_film(1), STORAGE), SIZE)
    sent = [raw for signature, raw, _ in model.seen if signature == "predict"]
    if address.startswith("grpc"):
        request = predict_pb2.PredictRequest.FromString(sent[0])
        assert request == predict_pb2.PredictRequest.FromString(  # field by field, nothing unknown
            protocol.predict_request("cxr", "predict", {"image": protocol.to_tensor(image[None])}).SerializeToString()
        )
    else:
        body = json.loads(sent[0])
        assert set(body) == {"signature_name", "inputs"}
        assert set(body["inputs"]) == {"image"}
        np.testing.assert_allclose(np.array(body["inputs"]["image"], np.float32), image[None], atol=6e-4)
    for secret in (NAME, PATIENT, "19600229", "a.dcm", str(folder), "1.2.840"):
        assert all(secret.encode() not in raw for _, raw, _ in model.seen)


def test_a_flaky_server_is_asked_again(served):
    model, address = served
    client = Client(address)
    assert client.about["size"] == SIZE
    model.errors = [(14, "connection reset"), (8, "The batch scheduling queue is full")]
    start = time.monotonic()
    [answer] = client([_film()])
    assert sum(answer.probabilities.values()) == pytest.approx(1, abs=1e-4)
    assert [signature for signature, _, _ in model.seen].count("predict") == 3
    assert time.monotonic() - start >= 0.3  # 0.1 to 0.2 s, then 0.2 to 0.4


def test_another_clients_wrong_shape_in_the_same_batch_is_worth_another_attempt(served):
    model, address = served
    text = "Tensors with name 'predict_image:0' from different tasks have different shapes and padding is turned off."
    model.errors = [(9, text)]
    assert len(Client(address)([_film()])) == 1


def test_a_server_that_stays_away_is_given_up(served):
    model, address = served
    client = Client(address, attempts=2)
    assert client.about
    model.errors = [(14, "overloaded")] * 9
    with pytest.raises(ServingError, match=r"after 2 attempts.*overloaded"):
        client([_film()])
    assert len(model.errors) == 7


@pytest.mark.parametrize("scheme", ["grpc", "http"])
def test_a_server_that_is_down(scheme, folder, capsys):
    address = f"{scheme}://127.0.0.1:9"  # nobody listens on discard
    code, out, err = _run(capsys, folder, "--server", address, "--attempts", 2)
    assert code == 1
    assert out == ""
    assert f"{address}: cannot be reached, after 2 attempts" in err
    assert "Traceback" not in err


def test_a_slow_server_meets_the_deadline(served):
    model, address = served
    client = Client(address, deadline=0.5)
    assert client.about
    model.delay = 3.0
    start = time.monotonic()
    with pytest.raises(ServingError, match=r"did not answer within 0\.5 seconds"):
        client([_film()])
    assert time.monotonic() - start < 2.0


def test_retries_end_with_the_deadline(served):
    model, address = served
    client = Client(address, deadline=0.6, attempts=50)
    assert client.about
    model.errors = [(14, "away")] * 60
    start = time.monotonic()
    with pytest.raises(ServingError, match="cannot be reached"):
        client([_film()])
    assert time.monotonic() - start < 2.0


def test_what_the_server_refuses_is_said_in_words_and_costs_the_others_nothing(served, folder, capsys):
    model, address = served
    with pytest.raises(SessionError) as refused:
        model.loaded("predict", image=np.zeros((1, 32, 32, 1), np.float32))
    model.errors = [(3, str(refused.value))] * 2  # the batch, then its first film alone
    code, out, err = _run(capsys, folder / "a.dcm", folder / "b.png", "--server", address, "--json")
    said = json.loads(out)
    assert code == 1
    assert [Path(row["film"]).name for row in said["films"]] == ["b.png"]
    assert [Path(row["film"]).name for row in said["failed"]] == ["a.dcm"]
    assert "refuses the request: image takes one film or more of 64 x 64 x 1; received the shape 1 32 32 1\n" in err


def test_answers_before_a_breakdown_are_printed(served, folder, capsys):
    model, address = served
    model.errors = []
    films = [folder / "a.dcm", folder / "b.png"]
    ask = model.predict

    def fails_at_the_second(name, signature, inputs, raw):
        if sum(seen == "predict" for seen, _, _ in model.seen) == 1:
            raise SessionError(14, "gone")
        return ask(name, signature, inputs, raw)

    model.predict = fails_at_the_second
    try:
        code, out, err = _run(capsys, *films, "--server", address, "--batch-size", 1, "--attempts", 1)
    finally:
        del model.predict
    assert code == 1
    assert "a.dcm" in out and "b.png" not in out
    assert "1 of 2 films were answered before" in err


def test_a_model_that_is_not_there_or_not_ours(served, monkeypatch):
    model, address = served
    with pytest.raises(ServingError, match='has no model "cxr2"'):
        Client(address, "cxr2")([_film()])
    for text in ("{}", "[]", "no JSON", json.dumps({**OPERATING, "size": -1}), json.dumps({**OPERATING, "classes": 3})):
        monkeypatch.setattr(model, "predict", lambda *a, text=text: {"about": np.array([text.encode()], object)})
        with pytest.raises(ServingError, match="no model of ours"):
            Client(address)([_film()])


def test_an_answer_of_another_shape_is_refused(served, monkeypatch):
    model, address = served
    ask = model.predict

    def other(name, signature, inputs, raw):
        answer = ask(name, signature, inputs, raw)
        return answer if signature == "about" else {**answer, "mask": answer["mask"][:, :9]}

    monkeypatch.setattr(model, "predict", other)
    with pytest.raises(ServingError, match="mask is missing or of another shape"):
        Client(address)([_film()])


def test_a_page_that_is_no_tensorflow_serving():
    class Page(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>")

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Page)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with pytest.raises(ServingError, match="no JSON that TensorFlow Serving writes"):
            Client(f"http://127.0.0.1:{server.server_port}")([_film()])
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    "address", ["localhost:8500", "ftp://host", "grpc://", "http:///x", "grpc://[::1", "http://host:port", ""]
)
def test_an_address_of_another_kind(address):
    with pytest.raises(ServingError, match="grpc://HOST:PORT"):
        Client(address)


@pytest.mark.parametrize(
    "settings", [{"deadline": 0}, {"deadline": math.nan}, {"deadline": math.inf}, {"attempts": 0}, {"batch_size": -1}]
)
def test_settings_that_make_no_sense(settings):
    with pytest.raises(ServingError, match="more than 0"):
        Client(**settings)


def test_no_film_at_all(tmp_path, capsys):
    code, _, err = _run(capsys, tmp_path / "none.dcm")
    assert code == 1 and "there is no such file" in err
    code, _, err = _run(capsys, tmp_path)
    assert code == 1 and "no DICOM, PNG or JPEG" in err


@pytest.mark.parametrize("kind", ["grpc", "rest"])
def test_the_client_needs_neither_tensorflow_nor_pandas(_servers, folder, kind):
    model, addresses = _servers
    model.reset()
    missing = ["tensorflow", "tensorflow_serving", "keras", "pandas", "pydantic", "rich", "typer", "scipy", "sklearn"]
    if kind == "rest":
        missing += ["grpc", "google.protobuf"]
    code = f"""
        import sys
        for name in {missing!r}:
            sys.modules[name] = None
        from export.serving.client import main
        sys.exit(main([{str(folder / "a.dcm")!r}, "--server", {addresses[kind]!r}]))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Typical" in done.stdout


def test_without_grpc_the_error_says_what_to_install(folder):
    code = (
        "import sys; sys.modules['grpc'] = None; from export.serving.client import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "pip install grpcio protobuf" in done.stderr
    assert "Traceback" not in done.stderr


# --- messages ---------------------------------------------------------------------------------------------------------


def test_messages_are_tensorflow_servings_own():
    image = np.random.default_rng(0).normal(size=(2, 3, 4, 1)).astype(np.float32)
    request = protocol.predict_request(
        "cxr",
        "predict",
        {"image": protocol.to_tensor(image), "image_bytes": protocol.to_tensor([b"\x00\xff", b""])},
    )
    theirs = predict_pb2.PredictRequest.FromString(request.SerializeToString())
    assert (theirs.model_spec.name, theirs.model_spec.signature_name) == ("cxr", "predict")
    np.testing.assert_array_equal(tf.make_ndarray(theirs.inputs["image"]), image)
    assert tf.make_ndarray(theirs.inputs["image_bytes"]).tolist() == [b"\x00\xff", b""]
    constant = protocol.constant_tensor(2.5, (3, 4))
    made = tf.make_tensor_proto(0.0)
    made.ParseFromString(constant.SerializeToString())
    np.testing.assert_array_equal(tf.make_ndarray(made), np.full((3, 4), 2.5, np.float32))


@pytest.mark.parametrize(
    "values",
    [
        np.array([[1.5, -2.0], [np.nan, 7.0]], np.float32),
        np.array([3, 3, 3], np.int32),
        np.array([b"a", b""], object),
        np.zeros((0, 4), np.float32),
        np.float32(4.0),
    ],
)
def test_tensors_are_read_however_they_are_written(values):
    values = np.asarray(values)
    theirs = tf.make_tensor_proto(values)
    ours = protocol.message("TensorProto").FromString(theirs.SerializeToString())
    np.testing.assert_array_equal(protocol.from_tensor(ours), values)


@given(arrays(np.float32, array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)))
def test_floats_come_back_as_they_were(values):
    sent = protocol.to_tensor(values).SerializeToString()
    np.testing.assert_array_equal(protocol.from_tensor(protocol.message("TensorProto").FromString(sent)), values)


def test_a_damaged_tensor_is_refused():
    tensor = protocol.to_tensor(np.zeros((2, 3), np.float32))
    tensor.tensor_shape.dim[0].size = 9
    with pytest.raises(protocol.ProtocolError, match=r"6 values for the shape \[9, 3\]"):
        protocol.from_tensor(tensor)
    tensor.tensor_shape.dim[0].size = -2
    with pytest.raises(protocol.ProtocolError):
        protocol.from_tensor(tensor)
    tensor.dtype = 99
    with pytest.raises(protocol.ProtocolError, match="Received: 99"):
        protocol.from_tensor(tensor)
