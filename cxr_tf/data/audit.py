"""Leakage and duplicates: patients, studies and near-identical films, across splits and across data sets."""

from __future__ import annotations

import base64
import errno
import io
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from PIL import Image

from cxr_tf.data.manifest import load_manifest
from cxr_tf.data.radiograph import read_radiograph
from cxr_tf.data.records import RecordError, read_record
from cxr_tf.data.shards import ShardFolder, open_shards
from cxr_tf.data.twins import Twin, find_twins, signatures
from cxr_tf.errors import CxrError
from cxr_tf.files import WriteError, replacing, writable_folder
from cxr_tf.preprocess import to_storage

TEST, TRAIN, PRETRAINING = "test", "train", "pre-training"

_KINDS = {(False, False): "copy", (True, False): "mirrored", (False, True): "inverted", (True, True): "both"}

_ON_PAGE = 200  # pairs that the page shows
_SHOWN = 10  # things that a message lists
_PICTURE = 224  # side of a film on the page, in pixels


class AuditError(CxrError):
    """Data sets that cannot be audited."""


@dataclass(frozen=True)
class Audit:
    """What `audit` found. No path, name or identifier of a patient is in it; a film is told by its data set and row.

    Attributes:
        sets: one row per data set, in the order given: `films`, and `splits` (their names; empty: none, so that the
            whole set counts as pre-training data).
        pairs: near-identical films, those that leak first, then by correlation: `kind` ("copy", "mirrored", "inverted",
            "both"), `correlation`, `leak` (a test film and one that is learned from), `same_patient`, and for the
            `first_` and the `second_` film `set` (from 1), `row` (from 0, of the manifest; of shards, the key),
            `source`, `split`.
        sides: patients and studies on several sides, one film of each side: `what` ("patient", "study"), `number`,
            `set`, `row`, `source`, `split`.
        unread: films that could not be looked at: `set`, `row`, `reason`.
        blank: how many films show nothing, and were held against no other.
        failures: why the audit fails, a sentence each; empty if it does not.
        notes: what should be known beside.
    """

    sets: pd.DataFrame
    pairs: pd.DataFrame
    sides: pd.DataFrame
    unread: pd.DataFrame
    blank: int
    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        """Whether a test film has a twin in what is learned from, somebody is on two sides, or a film was not read."""
        return bool(self.failures)

    def summary(self) -> str:
        """What was found, in lines for a terminal."""
        lines = []
        for number, films, splits in self.sets[["films", "splits"]].itertuples():
            lines.append(f"data set {number}: {films:,} films, {splits or f'no split: all count as {PRETRAINING}'}")
        lines.append(f"near-identical pairs: {len(self.pairs):,}")
        lines += [f"  {_pair_in_words(pair)}" for pair in self.pairs.head(_SHOWN).itertuples()]
        if len(self.pairs) > _SHOWN:
            lines.append(f"  ... and {len(self.pairs) - _SHOWN:,} more")
        for what, plural in (("patient", "patients"), ("study", "studies")):
            torn = self.sides[self.sides["what"] == what]
            lines.append(f"{plural} on several sides: {torn['number'].nunique():,}")
            for _, films in list(torn.groupby("number", sort=False))[:_SHOWN]:
                words = (_film_in_words(film.set, film.row, film.split) for film in films.itertuples())
                lines.append(f"  {', '.join(words)}")
        if len(self.unread):
            lines.append(f"films that could not be read: {len(self.unread):,}")
            for film in self.unread.head(_SHOWN).itertuples():
                lines.append(f"  data set {film.set}, row {film.row}: {film.reason}")
        lines += [f"note: {note}" for note in self.notes]
        lines += [f"FAILED: {failure}" for failure in self.failures] or ["passed"]
        return "\n".join(lines)


def _film_in_words(number: Any, row: Any, split: Any) -> str:
    return f"data set {number}, row {row} ({split or 'in no split'})"


def _pair_in_words(pair: Any) -> str:
    first = _film_in_words(pair.first_set, pair.first_row, pair.first_split)
    second = _film_in_words(pair.second_set, pair.second_row, pair.second_split)
    patient = "same patient" if pair.same_patient else "other patient"
    return f"{first} = {second}: {pair.kind}, correlation {pair.correlation:.3f}, {patient}{', LEAK' * pair.leak}"


def audit(
    paths: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str] | None = None,
    *,
    workers: int | None = None,
    progress: Callable[[int, int], object] | None = None,
    max_megapixels: float = 100.0,
) -> Audit:
    """Looks for patients, studies and near-identical films on several sides of a split, and across data sets.

    It fails when a film of the split "test" has a twin in any other split or in a data set without splits (which counts
    as pre-training data), when a patient or study is on several sides, or when films could not be read. A film without
    a split in a data set that has some is on no side. Patients and studies of different data sets are the same if their
    `source` and identifier are. Data sets for pre-training and the split "train" are one side.

    Memory holds the hashes, a kilobyte a film; small pictures lie in a temporary file, 12 KB a film. With several
    processes, a script that calls this needs Python's usual `if __name__ == "__main__":`.

    Args:
        paths: manifests (CSV), folders of shards, and run folders of `cxr-tf train`, whose films are in the parts that
            training made ("train", "validation", "test").
        out: folder for `audit.html` (pairs side by side, the first 200), `pairs.csv`, `sides.csv` and `unread.csv`.
            They name films by data set and row and hold no identifier, but the page shows films: it stays where the
            data is. Without a folder nothing is written.
        workers: processes that read films, then threads that compare them; one per core by default.
        progress: called with how many films were read and how many compared, in sum, and of how many in sum.
        max_megapixels: larger films are refused unread.

    Returns:
        The `Audit`.

    Raises:
        AuditError: no path, one given twice, one that does not exist, or no film that can be read.
        ManifestError, ShardError: a manifest or folder of shards cannot be used.
        WriteError: `out` cannot be written.

    Example:
        >>> found = audit(["shards/siim", "chexpert.csv"], "audit")  # doctest: +SKIP
        >>> found.failed, len(found.pairs)  # doctest: +SKIP
        (False, 3)
    """
    sets = _open_sets(paths)
    if out is not None:
        writable_folder(out)
    workers = workers or os.cpu_count() or 1
    table = _table(sets)
    films = _Films(sets, max_megapixels)
    done = 0

    def tick(some: int) -> None:
        nonlocal done
        done += some
        if progress is not None:
            progress(done, 2 * len(table))

    try:
        with tempfile.TemporaryFile(dir=out) as store:
            signs = signatures(films, len(table), workers, store, tick)
            if len(signs.unread) == len(table):
                reasons = "; ".join(sorted(set(signs.unread.values()))[:3])
                raise AuditError(f"none of the {len(table)} films can be read: {reasons}.")
            twins = find_twins(signs, workers, tick)
    except OSError as error:  # in closing it, too, which tries again to write what could not be written
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS, errno.ENOENT):
            raise AuditError(f"the audit cannot go on: {error.strerror or error}.") from error
        raise WriteError(
            f"{out or tempfile.gettempdir()}: a temporary file of 12 KB a film cannot be written ({error.strerror})."
        ) from error
    tick(len(table) - len(signs.films))  # what could not be compared
    pairs, sides = _pairs(table, twins), _sides(table)
    unread = table.loc[list(signs.unread), ["set", "row"]].assign(reason=list(signs.unread.values()))
    found = Audit(
        sets=_set_table(table, sets),
        pairs=pairs.drop(columns=["first", "second"]),
        sides=sides,
        unread=unread.reset_index(drop=True),
        blank=len(table) - len(signs.unread) - len(signs.films),
    )
    _judge(found, table)
    if out is not None:
        _write(found, pairs, films, Path(out))
    return found


# --- data sets ------------------------------------------------------------------------------------------------------


class _Set(NamedTuple):
    """A data set: its rows, and its films in shards or in files of their own."""

    manifest: pd.DataFrame
    shards: ShardFolder | None


def _open_sets(paths: Sequence[str | os.PathLike[str]]) -> list[_Set]:
    given = [Path(path) for path in paths]
    if not given:
        raise AuditError("give one or more manifests (CSV files), folders of shards or runs. Received: none")
    resolved = [path.resolve() for path in given]
    sets = []
    for number, path in enumerate(given):
        if resolved[number] in resolved[:number]:
            raise AuditError(f"{path} is given twice: every film would be its own twin.")
        try:
            there, of_run = path.exists(), (path / "config.toml").is_file()
        except OSError as error:
            raise AuditError(f"{path}: cannot be read ({error.strerror}).") from error
        if not there:
            raise AuditError(
                f"{path}: there is no such file or folder. Give a manifest (CSV), a folder of shards or a run."
            )
        if of_run:
            found = _of_run(path)
            assert found.shards is not None
            resolved[number] = found.shards.folder.resolve()
            if resolved[number] in resolved[:number]:
                raise AuditError(f"{found.shards.folder}, of {path}, is given twice: every film would be its own twin.")
            sets.append(found)
        elif path.is_dir():
            shards = open_shards(path)
            sets.append(_Set(shards.manifest, shards))
        else:
            sets.append(_Set(load_manifest(path), None))
    return sets


def _of_run(folder: Path) -> _Set:
    """The films of a run, each in the part that training put it into."""
    from cxr_tf.run import open_run

    run = open_run(folder)
    shards = run.shards()
    parts = run.parts()["part"].reindex(range(len(shards)))
    return _Set(shards.manifest.assign(split=parts.where(parts.notna(), None)), shards)


def _table(sets: Sequence[_Set]) -> pd.DataFrame:
    """One row per film of all sets; `side` is "" for a film in no split."""
    parts = []
    for number, (manifest, _) in enumerate(sets, start=1):
        split = manifest["split"].fillna("").astype(str)
        parts.append(
            pd.DataFrame(
                {
                    "set": number,
                    "row": np.arange(len(manifest)),
                    **{name: manifest[name].to_numpy() for name in ("source", "patient_id", "study_id")},
                    "split": split.to_numpy(),
                    "side": split.to_numpy() if split.any() else PRETRAINING,
                }
            )
        )
    return pd.concat(parts, ignore_index=True)


def _set_table(table: pd.DataFrame, sets: Sequence[_Set]) -> pd.DataFrame:
    rows = []
    for number in range(1, len(sets) + 1):
        split = table.loc[table["set"] == number, "split"]
        counts = split[split != ""].value_counts(sort=False)
        rows.append((len(split), ", ".join(f"{name} {count:,}" for name, count in counts.items())))
    return pd.DataFrame(rows, columns=["films", "splits"], index=range(1, len(sets) + 1))


class _Films:
    """The films of all data sets, one after the other; copies go to other processes."""

    def __init__(self, sets: Sequence[_Set], max_megapixels: float) -> None:
        self.sources = [shards or manifest["image"].tolist() for manifest, shards in sets]
        self.ends = np.cumsum([len(manifest) for manifest, _ in sets])
        self.max_megapixels = max_megapixels

    def read(self, film: int) -> np.ndarray | str:
        """A film, uint8 `[height, width]`, or why it cannot be read, without its path."""
        number = int(np.searchsorted(self.ends, film, side="right"))
        source, row = self.sources[number], film - (int(self.ends[number - 1]) if number else 0)
        if isinstance(source, ShardFolder):
            try:
                return read_record(source.read([row])[0], truth=False).image
            except RecordError:
                return "its record is damaged"
        path = source[row]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # `prepare` says them
                return read_radiograph(path, max_megapixels=self.max_megapixels)
        except CxrError as error:
            reason = str(error).replace(path, "the film").replace(Path(path).name, "the film")
            return reason.removeprefix("the film ").rstrip(".")
        except OSError as error:
            return error.strerror or type(error).__name__
        except MemoryError:
            return "needs more memory than there is"


# --- the verdict ----------------------------------------------------------------------------------------------------


def _pairs(table: pd.DataFrame, twins: Sequence[Twin]) -> pd.DataFrame:
    """The table of pairs, with the films' numbers in `first` and `second`."""
    first = np.asarray([twin.first for twin in twins], np.int64)
    second = np.asarray([twin.second for twin in twins], np.int64)
    sides = table["side"].to_numpy()
    one, other = sides[first], sides[second]
    who = table["source"].to_numpy() + "\0" + table["patient_id"].to_numpy()
    pairs = pd.DataFrame(
        {
            "kind": [_KINDS[twin.flipped, twin.inverted] for twin in twins],
            "correlation": np.asarray([twin.correlation for twin in twins], np.float64).round(4),
            "leak": ((one == TEST) != (other == TEST)) & (one != "") & (other != ""),
            "same_patient": who[first] == who[second],
            **{
                f"{end}_{name}": table[name].to_numpy()[films]
                for end, films in (("first", first), ("second", second))
                for name in ("set", "row", "source", "split")
            },
            "first": first,
            "second": second,
        }
    )
    return pairs.sort_values(["leak", "correlation"], ascending=False, kind="stable", ignore_index=True)


def _sides(table: pd.DataFrame) -> pd.DataFrame:
    """Patients and studies on several sides, one film of each side."""
    used = table[table["side"] != ""]
    used = used.assign(side=used["side"].replace(PRETRAINING, TRAIN))
    parts = []
    for what, column in (("patient", "patient_id"), ("study", "study_id")):
        who = used.groupby(["source", column], sort=False).ngroup()
        films = used.assign(what=what, number=who).drop_duplicates(["number", "side"])
        films = films[films.groupby("number")["side"].transform("size") > 1]
        films = films.assign(number=pd.factorize(films["number"])[0] + 1)
        parts.append(films.sort_values(["number", "set", "row"]))
    return pd.concat(parts)[["what", "number", "set", "row", "source", "split"]].reset_index(drop=True)


def _judge(found: Audit, table: pd.DataFrame) -> None:
    """Fills in failures and notes."""
    leaks = int(found.pairs["leak"].sum())
    if leaks:
        found.failures.append(f"{_number(leaks, 'pair')} of a test film and one in another split or in {PRETRAINING}")
    for what, plural in (("patient", "patients"), ("study", "studies")):
        torn = found.sides.loc[found.sides["what"] == what, "number"].nunique()
        if torn:
            found.failures.append(f"{_number(torn, what, plural)} on several sides")
    if len(found.unread):
        found.failures.append(f"{_number(len(found.unread), 'film')} could not be read, so nothing is known of them")
    if found.blank:
        found.notes.append(f"{_number(found.blank, 'film')} without content, held against no other")
    if not (table["side"] == TEST).any():
        found.notes.append(f'no film is in a split named "{TEST}": a leak into test data cannot be seen')


def _number(count: int, one: str, many: str = "") -> str:
    return f"{count:,} {one if count == 1 else many or one + 's'}"


# --- what is written ------------------------------------------------------------------------------------------------

_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Audit</title>
<meta name="viewport" content="width=device-width"><meta name="color-scheme" content="light dark">
<style>
:root { --bad: light-dark(#b00020, #ff8a80) }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 1000px; padding: 0 1em }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(470px, 100%), 1fr)); gap: 1.2em }
.pair { border: 1px solid #888; border-radius: 4px; padding: .6em } .leak { border: 2px solid var(--bad) }
.films { display: flex; gap: .5em } figure { margin: 0; flex: 1 } img { max-width: 100%; background: #000 }
figcaption { font-size: 13px } .bad { color: var(--bad) }
table { border-collapse: collapse } td, th { padding: 0 1em 0 0; text-align: left }
</style>
<h1 class="{{ 'bad' if found.failed }}">{{ "Failed" if found.failed else "Passed" }}</h1>
{% for line in found.failures %}<p class="bad">{{ line }}</p>{% endfor %}
{% for line in found.notes %}<p>{{ line }}</p>{% endfor %}
<p>Films are named by data set and row (from 0; in shards, the key). This page shows films: it stays where they are.</p>
<table><tr><th>data set<th>films<th>splits</tr>
{% for set in found.sets.itertuples() %}
<tr><td>{{ set.Index }}<td>{{ set.films }}<td>{{ set.splits or "none: pre-training" }}</tr>
{% endfor %}</table>
<h2>Near-identical films: {{ found.pairs | length }}</h2>
{% if found.pairs | length > pairs | length %}<p>The first {{ pairs | length }}; all are in pairs.csv.</p>{% endif %}
<div class="pairs">{% for pair, films in pairs %}
<div class="pair {{ 'leak' if pair.leak }}">
<div>{{ loop.index }}: {{ pair.kind }}, correlation {{ "%.3f" | format(pair.correlation) }},
{{ "same patient" if pair.same_patient else "other patient" }}
{%- if pair.leak %}, <b class="bad">leak</b>{% endif %}</div>
<div class="films">{% for film in films %}
<figure>{% if film.picture %}<img alt="The film of data set {{ film.set }}, row {{ film.row }}"
src="data:image/png;base64,{{ film.picture }}">{% endif %}
<figcaption>data set {{ film.set }}, row {{ film.row }}<br>{{ film.source }}, {{ film.split or "in no split" }}
</figcaption></figure>{% endfor %}</div></div>
{% endfor %}</div>
<h2>Patients and studies on several sides: {{ sides | length }}</h2>
<ul>{% for what, films in sides %}
<li>{{ what }}: {% for film in films %}data set {{ film.set }}, row {{ film.row }} ({{ film.split or "no split"
}}){{ ", " if not loop.last }}{% endfor %}</li>{% endfor %}</ul>
{% if found.unread | length %}<h2>Films that could not be read: {{ found.unread | length }}</h2>
<ul>{% for film in unread %}
<li>data set {{ film.set }}, row {{ film.row }}: {{ film.reason }}</li>{% endfor %}</ul>{% endif %}
</html>
"""


def _write(found: Audit, pairs: pd.DataFrame, films: _Films, out: Path) -> None:
    """Writes the tables and the page."""
    import jinja2

    for name, table in (("pairs.csv", found.pairs), ("sides.csv", found.sides), ("unread.csv", found.unread)):
        with replacing(out / name) as temporary:
            table.to_csv(temporary, index=False)
    shown = []
    for pair in pairs.head(_ON_PAGE).itertuples():
        ends = [
            {
                **{name: getattr(pair, f"{end}_{name}") for name in ("set", "row", "source", "split")},
                "picture": _picture(films.read(int(getattr(pair, end)))),
            }
            for end in ("first", "second")
        ]
        shown.append((pair, ends))
    sides = [(key[0], list(group.itertuples())) for key, group in found.sides.groupby(["what", "number"], sort=False)]
    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(_PAGE)
    text = page.render(
        found=found, pairs=shown, sides=sides[:_ON_PAGE], unread=list(found.unread.head(_ON_PAGE).itertuples())
    )
    with replacing(out / "audit.html") as temporary:
        temporary.write_text(text, encoding="utf-8")


def _picture(pixels: np.ndarray | str) -> str:
    """A film as small PNG in base64; "" if it can no longer be read."""
    if isinstance(pixels, str):
        return ""
    buffer = io.BytesIO()
    Image.fromarray(to_storage(pixels, _PICTURE)).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()
