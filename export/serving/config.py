"""The settings with which TensorFlow Serving runs an export: its own files, a compose file, a Kubernetes manifest.

TensorFlow Serving batches by model, never by signature, and an error in a batch is everybody's who is in it. So the
export is served as two models:

    NAME           savedmodel/1         every signature, no batching: a broken film fails nobody's request but its own
    NAME-batched   serving/batched/1    the signatures `predict` and `about` alone, batched: there is no file to decode

The second shares the first one's variables on disk (hard links, or copies where there are none); in memory both have
their own. `--enable_per_model_batching_parameters` makes the server batch models that have a `batching_params.pbtxt`
and no others.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

from cxr_tf.files import replacing
from export.about import read_about
from export.errors import ExportError
from export.serving.warmup import BATCH_SIZES, write_warmup

IMAGE = "tensorflow/serving:2.21.0"  # not older than the TensorFlow that exports
BATCHED = ("predict", "about")
_USER = 10001
_CPUS = 2
_FLAGS = (
    "--port=8500",
    "--rest_api_port=8501",
    "--model_config_file=/dist/serving/models.config",
    "--enable_batching=true",
    "--enable_per_model_batching_parameters=true",
    "--batching_parameters_file=/dist/serving/batching.config",
    "--monitoring_config_file=/dist/serving/monitoring.config",
    "--file_system_poll_wait_seconds=0",  # both models change together, when the server is started again
    "--max_num_load_retries=0",
    "--grpc_channel_arguments=grpc.max_receive_message_length=134217728",
    f"--tensorflow_intra_op_parallelism={_CPUS}",
    f"--tensorflow_inter_op_parallelism={_CPUS}",
)


def write_serving_config(out: Path, name: str = "cxr") -> Path:
    """Writes `out/serving` beside an exported `out/savedmodel/1`.

    It holds `models.config`, `batching.config`, `monitoring.config`, `compose.yaml`, `kubernetes.yaml`, and in
    `batched/1` the model that is batched. They expect `out` to be the server's `/dist`.

    Args:
        out: the folder that holds `savedmodel/1`, from `export.savedmodel.write_savedmodel`.
        name: what clients call the model: lower-case letters, digits and hyphens, 40 at most, a letter first.

    Returns:
        The folder `out/serving`.

    Raises:
        ExportError: for another name, when `out/serving` exists, or `out/savedmodel/1` is none of ours.
        WriteError: when it cannot be written.

    Example:
        >>> write_serving_config(Path("dist"), "cxr")  # doctest: +SKIP
        PosixPath('dist/serving')
    """
    if not re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", name):
        raise ExportError(
            "a served model's name is made of lower-case letters, digits and hyphens, 40 at most, with a letter first "
            f'and no hyphen last: Kubernetes takes no other. Received: "{name}"'
        )
    model, folder = out / "savedmodel" / "1", out / "serving"
    said = read_about(model)
    if folder.exists():
        raise ExportError(f"{folder}: exists already. Give another folder with --out, or delete it.")
    with replacing(folder) as temporary:
        _batched_model(model, temporary / "batched" / "1", said)
        for file, text in (
            ("models.config", _models(name)),
            ("batching.config", _BATCHING),
            ("batched/1/batching_params.pbtxt", _BATCHING),
            ("monitoring.config", _MONITORING),
            ("compose.yaml", _compose(name)),
            ("kubernetes.yaml", _kubernetes(name)),
        ):
            (temporary / file).write_text(text, encoding="utf-8")
    return folder


def _batched_model(model: Path, folder: Path, said: dict[str, Any]) -> None:
    """The same SavedModel with fewer signatures."""
    from tensorflow.core.protobuf import saved_model_pb2

    saved = saved_model_pb2.SavedModel.FromString((model / "saved_model.pb").read_bytes())
    for graph in saved.meta_graphs:
        for signature in set(graph.signature_def) - {*BATCHED, "__saved_model_init_op"}:
            del graph.signature_def[signature]
    folder.mkdir(parents=True)
    (folder / "saved_model.pb").write_bytes(saved.SerializeToString(deterministic=True))
    for part in ("variables", "assets"):
        shutil.copytree(model / part, folder / part, copy_function=_link)
    write_warmup(folder, BATCHED, said["size"], said["storage_size"])


def _link(source: str, target: str) -> str:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)
    return target


_BATCHING = f"""\
# tensorflow.serving.BatchingParameters. Of batching.config the server takes the threads alone; the rest is read from
# batched/1/batching_params.pbtxt, which holds the same.
max_batch_size {{ value: {BATCH_SIZES[-1]} }}
batch_timeout_micros {{ value: 2000 }}
max_enqueued_batches {{ value: 64 }}
num_batch_threads {{ value: {_CPUS} }}
{chr(10).join(f"allowed_batch_sizes: {size}" for size in BATCH_SIZES)}
"""

_MONITORING = """\
# tensorflow.serving.MonitoringConfig: http://HOST:8501/monitoring/prometheus/metrics
prometheus_config {
  enable: true
  path: "/monitoring/prometheus/metrics"
}
"""


def _models(name: str) -> str:
    return f"""\
# tensorflow.serving.ModelServerConfig
model_config_list {{
  # Every signature, no batching.
  config {{
    name: "{name}"
    base_path: "/dist/savedmodel"
    model_platform: "tensorflow"
  }}
  # {" and ".join(BATCHED)} alone, batched.
  config {{
    name: "{name}-batched"
    base_path: "/dist/serving/batched"
    model_platform: "tensorflow"
  }}
}}
"""


def _compose(name: str) -> str:
    # The image has bash, and no curl.
    probe = (
        "exec 3<>/dev/tcp/127.0.0.1/8501 && "
        f"printf 'GET /v1/models/{name} HTTP/1.1\\r\\nHost: localhost\\r\\nConnection: close\\r\\n\\r\\n' >&3 && "
        "grep -q '\"AVAILABLE\"' <&3"
    )
    return f"""\
# docker compose up, in this folder. Reachable from this machine alone: TensorFlow Serving asks nobody for a password.
services:
  {name}:
    image: {IMAGE}
    platform: linux/amd64
    entrypoint: ["tensorflow_model_server"]
    command:
{_items(_FLAGS, 6)}
    volumes:
      - ..:/dist:ro
    ports:
      - "127.0.0.1:8500:8500"
      - "127.0.0.1:8501:8501"
    user: "{_USER}:{_USER}"
    read_only: true
    tmpfs:
      - /tmp
    cap_drop:
      - ALL
    security_opt:
      - no-new-privileges:true
    cpus: {_CPUS}
    mem_limit: 4g
    restart: unless-stopped
    healthcheck:
      test:
        - CMD
        - bash
        - -c
        - {_quoted(probe)}
      interval: 10s
      timeout: 5s
      retries: 3
      start_period: 120s
"""


def _kubernetes(name: str) -> str:
    return f"""\
# The export's folder goes into a volume; the server starts when it is complete:
#
#   kubectl apply -f kubernetes.yaml
#   pod=$(kubectl get pod -l app={name} -o jsonpath='{{.items[0].metadata.name}}')
#   kubectl wait pod/$pod --for=jsonpath='{{.status.initContainerStatuses[0].state.running}}'
#   kubectl cp DIST/. $pod:/dist -c files
#   kubectl exec $pod -c files -- touch /dist/complete
#
# A new model: `kubectl delete -f kubernetes.yaml`, which takes the volume away too, and the same again with its DIST.
#
# TensorFlow Serving asks nobody for a password: the service is the cluster's own, and an ingress needs one in front.
apiVersion: v1
kind: PersistentVolumeClaim
metadata:
  name: {name}
  labels: {{app: {name}}}
spec:
  accessModes: [ReadWriteOnce]
  resources:
    requests:
      storage: 2Gi
---
apiVersion: apps/v1
kind: Deployment
metadata:
  name: {name}
  labels: {{app: {name}}}
spec:
  replicas: 1
  strategy:
    type: Recreate
  selector:
    matchLabels: {{app: {name}}}
  template:
    metadata:
      labels: {{app: {name}}}
      annotations:
        prometheus.io/scrape: "true"
        prometheus.io/port: "8501"
        prometheus.io/path: /monitoring/prometheus/metrics
    spec:
      automountServiceAccountToken: false
      enableServiceLinks: false
      nodeSelector:
        kubernetes.io/arch: amd64
      securityContext:
        runAsNonRoot: true
        runAsUser: {_USER}
        runAsGroup: {_USER}
        fsGroup: {_USER}
        seccompProfile:
          type: RuntimeDefault
      initContainers:
        - name: files
          image: {IMAGE}
          command: ["bash", "-c", "until [ -f /dist/complete ]; do sleep 2; done"]
          securityContext: &locked
            allowPrivilegeEscalation: false
            readOnlyRootFilesystem: true
            capabilities:
              drop: [ALL]
          resources:
            requests: {{cpu: 50m, memory: 64Mi}}
            limits: {{cpu: "1", memory: 256Mi}}
          volumeMounts:
            - {{name: dist, mountPath: /dist}}
            - {{name: tmp, mountPath: /tmp}}
      containers:
        - name: server
          image: {IMAGE}
          command: ["tensorflow_model_server"]
          args:
{_items(_FLAGS, 12)}
          ports:
            - {{name: grpc, containerPort: 8500}}
            - {{name: http, containerPort: 8501}}
          # The ports open when both models are loaded and warm.
          startupProbe:
            httpGet: {{path: /v1/models/{name}, port: http}}
            periodSeconds: 5
            failureThreshold: 60
          readinessProbe:
            httpGet: {{path: /v1/models/{name}, port: http}}
            periodSeconds: 10
            timeoutSeconds: 5
          livenessProbe:
            tcpSocket: {{port: grpc}}
            periodSeconds: 20
          securityContext: *locked
          resources:
            requests: {{cpu: "{_CPUS}", memory: 1Gi}}
            limits: {{cpu: "{_CPUS}", memory: 4Gi}}
          volumeMounts:
            - {{name: dist, mountPath: /dist, readOnly: true}}
            - {{name: tmp, mountPath: /tmp}}
      volumes:
        - name: dist
          persistentVolumeClaim:
            claimName: {name}
        - name: tmp
          emptyDir:
            sizeLimit: 64Mi
---
apiVersion: v1
kind: Service
metadata:
  name: {name}
  labels: {{app: {name}}}
spec:
  selector: {{app: {name}}}
  ports:
    - {{name: grpc, port: 8500, targetPort: grpc}}
    - {{name: http, port: 8501, targetPort: http}}
"""


def _items(flags: tuple[str, ...], indent: int) -> str:
    return "\n".join(f"{' ' * indent}- {flag}" for flag in flags)


def _quoted(text: str) -> str:
    """A YAML scalar in double quotes; compose takes a dollar sign for a variable, so there must be none."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
