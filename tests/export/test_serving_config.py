"""The files that TensorFlow Serving, Docker and Kubernetes read."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
import yaml
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format, wrappers_pb2
from tensorflow_serving.config import model_server_config_pb2

from export.errors import ExportError
from export.serving import config
from export.serving.config import write_serving_config
from export.serving.warmup import BATCH_SIZES

# tensorflow_serving/servables/tensorflow/session_bundle_config.proto and config/monitoring_config.proto, which
# tensorflow-serving-api leaves out.
_SERVER_ONLY = """
name: "server_only.proto" package: "serving" syntax: "proto3" dependency: "google/protobuf/wrappers.proto"
message_type {
  name: "BatchingParameters"
  field { name: "max_batch_size" number: 1 type: TYPE_MESSAGE type_name: ".google.protobuf.Int64Value" }
  field { name: "batch_timeout_micros" number: 2 type: TYPE_MESSAGE type_name: ".google.protobuf.Int64Value" }
  field { name: "max_enqueued_batches" number: 3 type: TYPE_MESSAGE type_name: ".google.protobuf.Int64Value" }
  field { name: "num_batch_threads" number: 4 type: TYPE_MESSAGE type_name: ".google.protobuf.Int64Value" }
  field { name: "thread_pool_name" number: 5 type: TYPE_MESSAGE type_name: ".google.protobuf.StringValue" }
  field { name: "allowed_batch_sizes" number: 6 label: LABEL_REPEATED type: TYPE_INT64 }
  field { name: "pad_variable_length_inputs" number: 7 type: TYPE_BOOL }
}
message_type {
  name: "PrometheusConfig"
  field { name: "enable" number: 1 type: TYPE_BOOL }
  field { name: "path" number: 2 type: TYPE_STRING }
}
message_type {
  name: "MonitoringConfig"
  field { name: "prometheus_config" number: 1 type: TYPE_MESSAGE type_name: ".serving.PrometheusConfig" }
}
"""


def _parsed(path, name):
    pool = descriptor_pool.DescriptorPool()
    wrappers = descriptor_pb2.FileDescriptorProto()
    wrappers_pb2.DESCRIPTOR.CopyToProto(wrappers)
    pool.Add(wrappers)
    pool.Add(text_format.Parse(_SERVER_ONLY, descriptor_pb2.FileDescriptorProto()))
    return text_format.Parse(path.read_text(), message_factory.GetMessageClass(pool.FindMessageTypeByName(name))())


class _Tiny(tf.Module):
    """The signatures' names over a model of one number: what they do is tested elsewhere."""

    def __init__(self, about):
        super().__init__()
        self.scale = tf.Variable(3.0)
        self.about = tf.saved_model.Asset(about)

    @tf.function(input_signature=[tf.TensorSpec([None, 8, 8, 1], tf.float32, name="image")])
    def predict(self, image):
        return {"mask": image * self.scale}

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="request")])
    def tell(self, request):
        return {"about": request}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    operating = {"size": 8, "storage_size": 16, "classes": ["a"], "task": "multilabel", "temperature": 1.0}
    operating |= {"thresholds": {"a": 0.5}, "mask_threshold": 0.5, "notice": "research use", "name": "x"}
    (folder / "cxr_tf.json").write_text(json.dumps(operating))
    model = _Tiny(str(folder / "cxr_tf.json"))
    signatures = {"serving_default": model.predict, "predict": model.predict, "about": model.tell}
    tf.saved_model.save(model, str(folder / "1"), signatures=signatures)
    return folder / "1"


@pytest.fixture
def out(tmp_path, source):
    shutil.copytree(source, tmp_path / "savedmodel" / "1")
    return tmp_path


@pytest.fixture
def serving(out):
    return write_serving_config(out, "cxr")


def test_two_models_are_served_and_one_of_them_is_batched(out, serving):
    served = text_format.Parse((serving / "models.config").read_text(), model_server_config_pb2.ModelServerConfig())
    places = {entry.name: entry.base_path for entry in served.model_config_list.config}
    assert set(places) == {"cxr", "cxr-batched"}
    assert {entry.model_platform for entry in served.model_config_list.config} == {"tensorflow"}
    for name, place in places.items():
        folder = out / os.path.relpath(place, "/dist")
        versions = [path.name for path in folder.iterdir() if path.name.isdigit()]
        assert versions == ["1"]
        assert (folder / "1" / "saved_model.pb").is_file()
        assert (folder / "1" / "batching_params.pbtxt").is_file() == (name == "cxr-batched")


@pytest.mark.parametrize("file", ["batching.config", "batched/1/batching_params.pbtxt"])
def test_batching(serving, file):
    batching = _parsed(serving / file, "serving.BatchingParameters")
    sizes = list(batching.allowed_batch_sizes)
    assert sizes == list(BATCH_SIZES) == sorted(set(sizes))
    assert batching.max_batch_size.value == sizes[-1]  # the server refuses anything else
    assert 0 < batching.batch_timeout_micros.value <= 10_000
    assert batching.num_batch_threads.value >= 1
    assert batching.max_enqueued_batches.value >= 1
    assert not batching.pad_variable_length_inputs


def test_monitoring(serving):
    monitoring = _parsed(serving / "monitoring.config", "serving.MonitoringConfig").prometheus_config
    assert monitoring.enable
    assert monitoring.path == "/monitoring/prometheus/metrics"


def test_the_batched_model_computes_the_same_and_takes_no_room(out, serving):
    one, two = out / "savedmodel" / "1", serving / "batched" / "1"
    answers = []
    for folder in (one, two):
        with tf.compat.v1.Session(graph=tf.Graph()) as session:
            meta = tf.compat.v1.saved_model.load(session, ["serve"], str(folder))
            signature = meta.signature_def["predict"]
            fed = {signature.inputs["image"].name: np.ones((2, 8, 8, 1), np.float32)}
            answers.append(session.run(signature.outputs["mask"].name, fed))
        names = set(meta.signature_def) - {"__saved_model_init_op"}
        assert names == ({"serving_default", "predict", "about"} if folder == one else {"predict", "about"})
    np.testing.assert_array_equal(*answers)
    data = "variables/variables.data-00000-of-00001"
    assert (one / data).samefile(two / data)
    assert (two / "assets" / "cxr_tf.json").read_bytes() == (one / "assets" / "cxr_tf.json").read_bytes()


def test_without_hard_links_it_is_copied(out, monkeypatch):
    def none(source, target):
        raise OSError("not here")

    monkeypatch.setattr(config.os, "link", none)
    two = write_serving_config(out) / "batched" / "1" / "variables" / "variables.index"
    one = out / "savedmodel" / "1" / "variables" / "variables.index"
    assert two.read_bytes() == one.read_bytes()
    assert not one.samefile(two)


def _flags(words):
    flags = dict(word.removeprefix("--").split("=", 1) for word in words)
    assert all(word.startswith("--") for word in words)
    return flags


def _check_flags(flags, out):
    assert flags["enable_batching"] == flags["enable_per_model_batching_parameters"] == "true"
    assert (flags["port"], flags["rest_api_port"]) == ("8500", "8501")
    for flag in ("model_config_file", "batching_parameters_file", "monitoring_config_file"):
        assert (out / os.path.relpath(flags[flag], "/dist")).is_file()


def test_compose(out, serving):
    composed = yaml.safe_load((serving / "compose.yaml").read_text())
    (service,) = composed["services"].values()
    assert re.fullmatch(r"tensorflow/serving:\d+\.\d+\.\d+", service["image"])
    assert service["entrypoint"] == ["tensorflow_model_server"]
    _check_flags(_flags(service["command"]), out)
    assert service["volumes"] == ["..:/dist:ro"]  # of the folder that the file is in
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert not service["user"].startswith("0")
    probe = service["healthcheck"]["test"]
    assert probe[:3] == ["CMD", "bash", "-c"]
    assert "/v1/models/cxr " in probe[3]
    assert "$" not in probe[3]  # compose takes it for a variable


def test_the_line_in_the_docs_says_the_same(serving):
    docs = Path(__file__).parents[2] / "docs" / "serving.md"
    (line,) = re.findall(r"^docker run (.*?)```", docs.read_text(), flags=re.DOTALL | re.MULTILINE)
    before, image, flags = line.replace("\\\n", " ").partition(config.IMAGE)
    assert image
    composed = yaml.safe_load((serving / "compose.yaml").read_text())["services"]["cxr"]
    assert set(flags.split()) <= set(composed["command"])
    for words in ("--user 10001:10001", "--read-only", "/dist:ro", "--entrypoint tensorflow_model_server"):
        assert words in before


def test_the_health_check_tells_a_loaded_model_from_none(serving):
    """Bash's half of it against a server that says what TensorFlow Serving says."""
    import subprocess
    import threading
    from http.server import BaseHTTPRequestHandler, HTTPServer

    seen = []

    class Status(BaseHTTPRequestHandler):
        state = "AVAILABLE"

        def do_GET(self):
            seen.append(self.path)
            body = json.dumps({"model_version_status": [{"version": "1", "state": self.state}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments):
            pass

    server = HTTPServer(("127.0.0.1", 0), Status)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    probe = yaml.safe_load((serving / "compose.yaml").read_text())["services"]["cxr"]["healthcheck"]["test"][1:]
    probe[-1] = probe[-1].replace("/8501", f"/{server.server_port}")
    try:
        assert subprocess.run(probe, timeout=20, check=False).returncode == 0
        for Status.state in ("LOADING", "UNAVAILABLE"):
            assert subprocess.run(probe, timeout=20, check=False).returncode != 0
    finally:
        server.shutdown()
        server.server_close()
    assert seen == ["/v1/models/cxr"] * 3
    assert subprocess.run(probe, timeout=20, check=False, stderr=subprocess.DEVNULL).returncode != 0


def test_kubernetes(out, serving):
    claim, deployment, service = yaml.safe_load_all((serving / "kubernetes.yaml").read_text())
    assert [item["kind"] for item in (claim, deployment, service)] == ["PersistentVolumeClaim", "Deployment", "Service"]
    pod = deployment["spec"]["template"]
    assert deployment["spec"]["selector"]["matchLabels"] == service["spec"]["selector"] == pod["metadata"]["labels"]
    spec = pod["spec"]
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["runAsUser"] > 0
    assert spec["automountServiceAccountToken"] is False
    (server,), (files,) = spec["containers"], spec["initContainers"]
    for container in (server, files):
        assert re.fullmatch(r"tensorflow/serving:\d+\.\d+\.\d+", container["image"])
        locked = container["securityContext"]
        assert locked["readOnlyRootFilesystem"] is True
        assert locked["allowPrivilegeEscalation"] is False
        assert locked["capabilities"] == {"drop": ["ALL"]}
        assert {"cpu", "memory"} == set(container["resources"]["limits"]) == set(container["resources"]["requests"])
    assert server["command"] == ["tensorflow_model_server"]
    _check_flags(_flags(server["args"]), out)
    for probe in ("startupProbe", "readinessProbe"):
        assert server[probe]["httpGet"] == {"path": "/v1/models/cxr", "port": "http"}
    assert server["livenessProbe"]["tcpSocket"] == {"port": "grpc"}
    ports = {port["name"]: port["containerPort"] for port in server["ports"]}
    assert ports == {"grpc": 8500, "http": 8501}
    assert {port["targetPort"]: port["port"] for port in service["spec"]["ports"]} == ports
    mounts = {mount["name"]: mount for mount in server["volumeMounts"]}
    assert mounts["dist"] == {"name": "dist", "mountPath": "/dist", "readOnly": True}
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    assert volumes["dist"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert set(mounts) <= set(volumes)


def test_another_name_stands_everywhere(out):
    serving = write_serving_config(out, "siim-covid19")
    for file in ("models.config", "compose.yaml", "kubernetes.yaml"):
        text = (serving / file).read_text()
        assert "siim-covid19" in text
        assert "/v1/models/cxr" not in text and '"cxr' not in text


@pytest.mark.parametrize("name", ["", "Cxr", "a_b", "9a", "-a", "a-", "a" * 41, "a b", "a/b", "ä"])
def test_a_name_that_kubernetes_would_refuse(out, name):
    with pytest.raises(ExportError, match="lower-case letters"):
        write_serving_config(out, name)
    assert not (out / "serving").exists()


def test_nothing_is_overwritten_and_nothing_is_half_written(out, serving):
    before = sorted(out.rglob("*"))
    with pytest.raises(ExportError, match="exists already"):
        write_serving_config(out)
    assert sorted(out.rglob("*")) == before


def test_a_folder_without_our_model(tmp_path, source):
    with pytest.raises(ExportError, match="savedmodel"):
        write_serving_config(tmp_path)
    shutil.copytree(source, tmp_path / "savedmodel" / "1")
    (tmp_path / "savedmodel" / "1" / "assets" / "cxr_tf.json").unlink()
    with pytest.raises(ExportError, match="not one of ours"):
        write_serving_config(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["savedmodel"]
