"""Asks TensorFlow Serving about films: DICOM, PNG or JPEG files, over gRPC or REST.

    python -m export.serving.client film.dcm folder/ --server grpc://localhost:8500 --model cxr

Needs NumPy, Pillow and pydicom; for gRPC also protobuf and grpcio. No TensorFlow.

Films are decoded and brought to the model's size here, with the code that training used, so that a broken one is named
while the others go on, and pixels are all that leaves: no header of a file, no name, no path.
"""

from __future__ import annotations

import argparse
import http.client
import json
import math
import random
import re
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cxr_tf import preprocess
from cxr_tf.data.radiograph import RadiographError, read_radiograph
from cxr_tf.errors import CxrError
from cxr_tf.files import replacing
from cxr_tf.operating import wrong_keys
from cxr_tf.predict import MASK, Prediction, named_films, refuse_used, table
from cxr_tf.terminal import command

_FIRST_WAIT = 0.2  # seconds before the second attempt; then twice as long each time
_LONGEST_WAIT = 10.0
# What may go better a moment later. HTTP's are those that TensorFlow Serving, or a proxy in front of it, has for these.
_PASSING = {"UNAVAILABLE", "RESOURCE_EXHAUSTED", "ABORTED"}
_HTTP = {
    400: "INVALID_ARGUMENT",
    404: "NOT_FOUND",
    409: "ABORTED",
    412: "FAILED_PRECONDITION",
    429: "RESOURCE_EXHAUSTED",
    502: "UNAVAILABLE",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}


class ServingError(CxrError):
    """A server that does not answer, or not as one of our models does.

    Attributes:
        code: gRPC's name of what went wrong, for example "INVALID_ARGUMENT" or "UNAVAILABLE"; empty for another error.
    """

    def __init__(self, text: str, code: str = ""):
        super().__init__(text)
        self.code = code


class Client:
    """A served model, as a function of films.

    Args:
        server: "grpc://host:8500", or "http://host:8501" for REST; "grpcs" and "https" with TLS.
        model: its name there: "cxr", or "cxr-batched", whose requests the server puts together with other clients'.
        deadline: seconds for one request, with all its attempts.
        attempts: how often a request is sent before an unreachable or busy server is given up.
        batch_size: films in one request, at most.

    Raises:
        ServingError: for an address of another kind; `about` and calls, when the server is not reached, not in time, or
            refuses what it is sent.

    Example:
        >>> client = Client("http://localhost:8501")  # doctest: +SKIP
        >>> [answer] = client([cxr_tf.read_radiograph("film.dcm")])  # doctest: +SKIP
        >>> answer.probabilities  # doctest: +SKIP
        {'Negative for Pneumonia': 0.93, ...}
    """

    def __init__(
        self,
        server: str = "grpc://localhost:8500",
        model: str = "cxr",
        *,
        deadline: float = 30.0,
        attempts: int = 5,
        batch_size: int = 16,
    ):
        if not (0 < deadline < math.inf and attempts > 0 and batch_size > 0):
            raise ServingError(
                "deadline, attempts and batch size are more than 0. "
                f"Received: {deadline:g} s, {attempts} attempts, batches of {batch_size}"
            )
        scheme, _, address = server.partition("://")
        if scheme not in ("grpc", "grpcs", "http", "https") or not _is_address(server):
            raise ServingError(
                "the server's address is grpc://HOST:PORT (8500 is usual) or http://HOST:PORT (8501); with TLS grpcs "
                f'or https. Received: "{server}"'
            )
        self.server, self.model = server, model
        self.deadline, self.attempts, self.batch_size = deadline, attempts, batch_size
        if scheme in ("grpc", "grpcs"):
            self._send = _grpc(address, model, secure=scheme == "grpcs")
        else:
            self._send = _rest(server.rstrip("/"), model)

    @cached_property
    def about(self) -> dict[str, Any]:
        """What the model says of itself: `classes`, `size`, `storage_size`, `mask_threshold` and more."""
        try:
            text = self._ask("about", "request", [b""])["about"][0]
            said = json.loads(text)
            fits = not wrong_keys(said)
        except (KeyError, IndexError, ValueError, TypeError):
            fits = False
        except ServingError as error:
            if error.code not in ("FAILED_PRECONDITION", "INVALID_ARGUMENT"):  # no such signature: gRPC's word, REST's
                raise
            fits = False
        if not fits:
            raise ServingError(
                f'{self.server}: "{self.model}" is no model of ours, or an older one: it does not say its class names '
                "and sizes. `cxr-tf export` writes models that do."
            )
        return said

    def __call__(self, films: Sequence[np.ndarray]) -> list[Prediction]:
        """Asks about films: uint8 `[height, width]` each, as `read_radiograph` gives them."""
        prepared = [self._prepare(film) for film in films]
        answers: list[Prediction] = []
        for start in range(0, len(prepared), self.batch_size):
            answers += self._predict(prepared[start : start + self.batch_size])
        return answers

    def predict_files(self, paths: Iterable[Path]) -> Iterator[tuple[Path, Prediction | CxrError]]:
        """Asks about files, a batch at a time.

        Yields:
            Each path, in order, with its answer, or with the error that says why there is none: the film cannot be
            read, or the server refuses it.

        Raises:
            ServingError: when the server is not reached, or is none of ours.
        """
        waiting: list[tuple[Path, _Prepared | CxrError]] = []
        for path in paths:
            try:
                waiting.append((path, self._prepare(read_radiograph(path))))
            except RadiographError as error:
                waiting.append((path, error))
            if sum(isinstance(item, _Prepared) for _, item in waiting) == self.batch_size:
                yield from self._answered(waiting)
                waiting = []
        yield from self._answered(waiting)

    def _answered(
        self, waiting: list[tuple[Path, _Prepared | CxrError]]
    ) -> Iterator[tuple[Path, Prediction | CxrError]]:
        films = [item for _, item in waiting if isinstance(item, _Prepared)]
        answers: list[Prediction | CxrError] = []
        try:
            answers += self._predict(films) if films else []
        except ServingError as error:
            if error.code != "INVALID_ARGUMENT":
                raise
            for film in films:  # one of them, or all
                try:
                    answers += self._predict([film])
                except ServingError as own:
                    if own.code != "INVALID_ARGUMENT":
                        raise
                    answers.append(own)
        remaining = iter(answers)
        for path, item in waiting:
            yield path, next(remaining) if isinstance(item, _Prepared) else item

    def _prepare(self, pixels: np.ndarray) -> _Prepared:
        stored = preprocess.to_storage(pixels, self.about["storage_size"])
        size = self.about["size"]
        box = preprocess.content_box(stored.shape[0], stored.shape[1], size)
        return _Prepared(preprocess.to_input(stored, size), box, pixels.shape[0], pixels.shape[1])

    def _predict(self, films: Sequence[_Prepared]) -> list[Prediction]:
        outputs = self._ask("predict", "image", np.stack([film.image for film in films]))
        classes, size, count = self.about["classes"], self.about["size"], len(films)
        shapes = {"probabilities": (count, len(classes)), "mask": (count, size, size, 1)}
        wrong = [name for name, shape in shapes.items() if name in outputs and outputs[name].shape != shape]
        if wrong or not shapes.keys() & outputs.keys():
            raise ServingError(
                f"{self.server}: the answer is not one of ours: {', '.join(wrong) or 'probabilities'} is missing or of "
                "another shape than the model says of itself."
            )
        answers = []
        for i, film in enumerate(films):
            said = map(float, outputs["probabilities"][i]) if "probabilities" in outputs else ()
            mask = None
            if "mask" in outputs:
                whole = preprocess.mask_to_original(outputs["mask"][i], film.box, film.height, film.width)
                mask = whole.clip(0.0, 1.0)
            answers.append(Prediction(dict(zip(classes, said, strict=False)), mask))
        return answers

    def _ask(self, signature: str, name: str, values: np.ndarray | list[bytes]) -> dict[str, np.ndarray]:
        """One request, sent again after a growing wait while the server is unreachable or busy."""
        end = time.monotonic() + self.deadline
        for attempt in range(1, self.attempts + 1):
            left = end - time.monotonic()
            try:
                if left <= 0:
                    raise ServingError("", "DEADLINE_EXCEEDED")
                return self._send(signature, name, values, left)
            except ServingError as error:
                # In a batch that the server puts together, another client's wrong shape is everybody's error.
                passing = error.code in _PASSING or "different tasks" in str(error)
                # At random, so that clients whose server was away do not come back all at once.
                wait = min(_FIRST_WAIT * 2 ** (attempt - 1), _LONGEST_WAIT) * random.uniform(0.5, 1.0)
                if not passing or attempt == self.attempts or time.monotonic() + wait > end:
                    raise self._in_words(error, attempt) from None
                time.sleep(wait)
        raise AssertionError("unreachable")

    def _in_words(self, error: ServingError, attempts: int) -> ServingError:
        text = {
            "DEADLINE_EXCEEDED": f"did not answer within {self.deadline:g} seconds. Give it longer, or smaller batches",
            "UNAVAILABLE": f"cannot be reached, after {attempts} attempts. Is it running, and is the address right",
            "RESOURCE_EXHAUSTED": f"is too busy, or a request too large, after {attempts} attempts",
            "NOT_FOUND": f'has no model "{self.model}". `models.config` lists what it serves',
            "INVALID_ARGUMENT": "refuses the request",
        }.get(error.code, f"answers with an error ({error.code or 'no code'})")
        said = _said(str(error))
        return ServingError(f"{self.server}: {text}{f': {said}' if said else ''}", error.code)


def _is_address(server: str) -> bool:
    try:
        parts = urllib.parse.urlsplit(server)
        return bool(parts.hostname) and parts.port != 0  # `port` raises for what is no number
    except ValueError:
        return False


@dataclass(frozen=True)
class _Prepared:
    image: np.ndarray  # model input
    box: tuple[int, int, int, int]  # where the film lies in it
    height: int  # of the film
    width: int


_Send = Callable[[str, str, "np.ndarray | list[bytes]", float], dict[str, np.ndarray]]


def _grpc(address: str, model: str, *, secure: bool) -> _Send:
    try:
        import grpc

        from export.serving import protocol
    except ModuleNotFoundError as error:
        raise ServingError(
            f"{error.name} is needed for gRPC and not installed: pip install grpcio protobuf. "
            "Or ask over REST: --server http://HOST:8501"
        ) from error
    options = [
        ("grpc.max_send_message_length", -1),
        ("grpc.max_receive_message_length", -1),
        # A channel that has failed to connect fails at once until it tries again: not later than the next attempt here.
        ("grpc.initial_reconnect_backoff_ms", int(500 * _FIRST_WAIT)),
        ("grpc.min_reconnect_backoff_ms", int(500 * _FIRST_WAIT)),
    ]
    if secure:
        channel = grpc.secure_channel(address, grpc.ssl_channel_credentials(), options=options)
    else:
        channel = grpc.insecure_channel(address, options=options)
    call = channel.unary_unary(
        protocol.PREDICT,
        request_serializer=lambda request: request.SerializeToString(),
        response_deserializer=protocol.message("PredictResponse").FromString,
    )

    def send(signature: str, name: str, values: np.ndarray | list[bytes], timeout: float) -> dict[str, np.ndarray]:
        request = protocol.predict_request(model, signature, {name: protocol.to_tensor(values)})
        try:
            answer = call(request, timeout=timeout)
        except grpc.RpcError as error:
            raise ServingError(error.details() or "", error.code().name) from error
        return {key: protocol.from_tensor(tensor) for key, tensor in answer.outputs.items()}

    return send


def _rest(server: str, model: str) -> _Send:
    url = f"{server}/v1/models/{urllib.parse.quote(model)}:predict"

    def send(signature: str, name: str, values: np.ndarray | list[bytes], timeout: float) -> dict[str, np.ndarray]:
        # Three decimals of 255 gray levels: a third of the text.
        inputs = np.round(values.astype(np.float64), 3).tolist() if isinstance(values, np.ndarray) else [""]
        body = json.dumps({"signature_name": signature, "inputs": {name: inputs}}, separators=(",", ":")).encode()
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                content = answer.read()
        except urllib.error.HTTPError as error:
            raise ServingError(_rest_error(error), _HTTP.get(error.code, f"HTTP {error.code}")) from error
        except TimeoutError as error:
            raise ServingError("", "DEADLINE_EXCEEDED") from error
        except (OSError, http.client.HTTPException) as error:
            late = isinstance(getattr(error, "reason", None), TimeoutError)
            raise ServingError(
                str(getattr(error, "reason", error)), "DEADLINE_EXCEEDED" if late else "UNAVAILABLE"
            ) from error
        try:
            outputs = json.loads(content)["outputs"]
            # A model with one output has its name left out.
            named = outputs if isinstance(outputs, dict) else {"about": outputs} if signature == "about" else {}
            return {
                key: np.asarray(value, np.float32 if key in ("probabilities", "mask") else None)
                for key, value in named.items()
            }
        except (ValueError, KeyError, TypeError) as error:
            raise ServingError("the answer is no JSON that TensorFlow Serving writes") from error

    return send


def _rest_error(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.loads(error.read())["error"])
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError):
        return ""


def _said(text: str) -> str:
    """TensorFlow's message as a sentence: without the places in its graph, and with the values of an assertion."""
    text = re.sub(r"\s*\[\[\{\{.*", "", text.strip(), flags=re.DOTALL)
    if "assertion failed:" in text:
        text = " ".join(re.findall(r"\[([^\[\]]*)\]", text.partition("assertion failed:")[2]))
    elif "{{node" in text:
        text = re.sub(r"\{\{node [^}]*\}\}\s*", "", text)
    text = " ".join(text.split())
    return f"{text[:300]}..." if len(text) > 300 else text


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: prints a table or JSON; the exit code is 0 when every film was answered."""
    options = _parser().parse_args(arguments)
    return command(lambda: _run(options))


def _run(options: argparse.Namespace) -> int:
    films = named_films(options.films)
    files = [path for _, path in films]
    if options.masks is not None:
        refuse_used(options.masks, "--masks")
    client = Client(
        options.server,
        options.model,
        deadline=options.deadline,
        attempts=options.attempts,
        batch_size=options.batch_size,
    )
    rows: list[dict[str, Any]] = []
    failed: list[dict[str, str]] = []
    stopped: CxrError | None = None
    try:
        for (name, _), (path, said) in zip(films, client.predict_files(files), strict=True):
            if isinstance(said, CxrError):
                failed.append({"film": str(path), "error": str(said)})
                continue
            row: dict[str, Any] = {"film": str(path), **said.probabilities}
            if said.mask is not None:
                found = said.mask >= client.about["mask_threshold"]
                row["mask_area"] = float(found.mean())
                if options.masks is not None:
                    row["mask"] = f"{name}{MASK}"
                    with replacing(options.masks / row["mask"]) as temporary:
                        Image.fromarray(found.astype(np.uint8) * 255).save(temporary, format="PNG")
            rows.append(row)
    except CxrError as error:  # what was answered before is printed all the same
        stopped = error
    if options.json:
        print(json.dumps({"films": rows, "failed": failed}, indent=2, ensure_ascii=False))
    elif rows:
        print(table(rows))
    for item in failed:
        named = "" if item["error"].startswith(item["film"]) else f"{item['film']}: "
        print(f"no answer: {named}{item['error']}", file=sys.stderr)
    if rows:
        print("Research use, not a medical device.", file=sys.stderr)
    if stopped is not None:
        answered = f" {len(rows)} of {len(files)} films were answered before." if rows else ""
        print(f"error: {stopped}{answered}", file=sys.stderr)
    return 1 if failed or stopped else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cxr-tf-client", description="Asks TensorFlow Serving about films. Only their pixels are sent."
    )
    parser.add_argument("films", nargs="+", type=Path, metavar="FILM", help="DICOM, PNG or JPEG files, or folders")
    parser.add_argument(
        "--server", default="grpc://localhost:8500", help="grpc://HOST:PORT or http://HOST:PORT (default: %(default)s)"
    )
    parser.add_argument("--model", default="cxr", help="its name on the server (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--masks", type=Path, metavar="FOLDER", help="write masks there, in the films' own pixels")
    parser.add_argument("--batch-size", type=int, default=16, help="films in one request (default: %(default)s)")
    parser.add_argument(
        "--deadline", type=float, default=30.0, help="seconds for one request and its attempts (default: %(default)g)"
    )
    parser.add_argument("--attempts", type=int, default=5, help="before a server is given up (default: %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
