"""Planted names, numbers and UIDs leave in no output: all bytes that a whole journey writes are searched.

The contract's exceptions are the tables beside the shards (`LOCAL`), which stay where the data is, and a film's path
where a person must find the film: on the terminal, and in what `predict` says of the films that it was given. Those
paths are taken out whole before the search, so that nothing else passes with them.
"""

from __future__ import annotations

import base64
import csv
import gzip
import hashlib
import io
import json
import re
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pydicom
import pytest
from PIL import Image, PngImagePlugin
from pydicom.uid import UID

from cxr_tf.data.inspection import inspect_films
from cxr_tf.data.manifest import load_manifest, rows_where, save_manifest
from cxr_tf.data.phantom import write_siim
from cxr_tf.data.radiograph import read_header, read_radiograph
from cxr_tf.data.readers.siim import read_siim
from cxr_tf.data.shards import open_shards, prepare
from cxr_tf.errors import CxrError

LOCAL = {"manifest.csv", "rejected.csv", "noted.csv"}

# Every planted value has one of these in it; none is a word that anything else would write.
WORDS = {
    "patient's name": "Quastelhuber",
    "patient's given name": "Zenobia",
    "patient id": "ZQPID",
    "other patient id": "ZQOTH",
    "birth date": "19310923",
    "birth date as people write it": "1931-09-23",
    "address": "Klabautergasse",
    "accession number": "ZQACC",
    "study id": "ZQSID",
    "study date": "20190317",
    "study time": "041733.27",
    "referring physician": "Drosselmeyerin",
    "operator": "Wurzelsepp",
    "institution": "Sanktquirin",
    "station": "ZQSTAT",
    "serial number": "ZQSER",
    "comment": "Habakukbemerkung",
    "private element": "Zwiebelfisch",
    "overlay or curve": "Kurvenwort",
    "application entity": "ZQAET",
    "uid": "1.2.826.0.1.9907181.",
}
FORMS = [
    (what, form)
    for what, word in WORDS.items()
    # NumPy keeps text at four bytes a letter.
    for form in {word.lower().encode(code) for code in ("utf-8", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be")}
]


# --- the search -----------------------------------------------------------------------------------------------------


class Search:
    """Says what of the planted is in some bytes: the words above, and digests of whole values.

    Args:
        values: names, ids and UIDs whose digests are looked for, as hex, as base64 and raw, cut short too.
    """

    def __init__(self, values: set[str]) -> None:
        self.digests: dict[int, str] = {}
        for value in values:
            for kind in ("md5", "sha1", "sha256"):
                digest = hashlib.new(kind, value.encode()).digest()
                hexes = digest.hex().encode(), digest.hex().upper().encode()
                for form in (digest, *hexes, base64.b64encode(digest)):
                    self.digests[int.from_bytes(form[:8], "little")] = f"{kind} of {value}"
        self.starts = np.array(sorted(self.digests), np.uint64)
        self.first_two = np.zeros(2**16, bool)
        self.first_two[(self.starts & np.uint64(0xFFFF)).astype(int)] = True

    def __call__(self, content: bytes) -> set[str]:
        return {what for layer in layers(content) for what in self._in(layer)}

    def _in(self, content: bytes) -> set[str]:
        lowered = content.lower()
        found = {what for what, form in FORMS if form in lowered}
        for offset in range(min(8, max(0, len(content) - 7))):  # eight bytes at every place, as numbers
            numbers = np.frombuffer(content, "<u8", (len(content) - offset) // 8, offset)
            likely = numbers[self.first_two[(numbers & np.uint64(0xFFFF)).astype(np.uint16)]]
            found |= {self.digests[int(number)] for number in likely[np.isin(likely, self.starts)]}
        return found


def layers(content: bytes) -> Iterator[bytes]:
    """The bytes, and whatever is packed in them: members of archives, data URIs, deflated streams at any place."""
    # In megabytes of base64 five letters stand by chance; what they say is looked at below.
    yield re.sub(rb"base64,[A-Za-z0-9+/]+=*", b"", content)
    if content.startswith(b"PK\x03\x04"):
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            for name in archive.namelist():
                yield from layers(archive.read(name))
        return
    if content.startswith(b"\x1f\x8b"):
        yield from layers(gzip.decompress(content))
        return
    for uri in re.finditer(rb"base64,([A-Za-z0-9+/]+=*)", content):
        yield from layers(base64.b64decode(uri[1]))
    whole = memoryview(content)
    for start in re.finditer(rb"\x78[\x01\x5e\x9c\xda]", content):  # the text of a PNG, the masks of a shard
        try:
            yield zlib.decompressobj().decompress(whole[start.start() : start.start() + 2**20], 2**24)
        except zlib.error:
            continue


def leaks(search: Search, folder: Path, paths: set[str] = frozenset()) -> dict[str, set[str]]:
    """What is found in the files below a folder and in their names, without the paths that may be said there."""
    found = {}
    for file in sorted(folder.rglob("*")):
        if file.is_file() and file.name not in LOCAL:
            content, name = file.read_bytes(), str(file.relative_to(folder))
            for path in sorted(paths, key=len, reverse=True):
                content, name = content.replace(path.encode(), b""), name.replace(path, "")
            if here := search(content) | search(name.encode()):
                found[str(file.relative_to(folder))] = here
    return found


def _png(**text: str | bool) -> bytes:
    info, packed = PngImagePlugin.PngInfo(), bool(text.get("packed"))
    info.add_text("Comment", str(text["comment"]), zip=packed)
    info.add_itxt("Author", str(text["author"]), zip=packed)
    buffer = io.BytesIO()
    Image.new("L", (8, 8)).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def _zipped(text: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("metadata.json", text)
    return buffer.getvalue()


def _arrays() -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, names=np.array(["nobody", "Zenobia"]))
    return buffer.getvalue()


def _record() -> bytes:
    packed = zlib.compress(b"." * 99 + b"ZQPID00007")
    return b"\n\x04mask\x12" + bytes([len(packed)]) + packed + b"\n\x06height"


UID_PLANTED = "1.2.826.0.1.9907181.3.7"
DIGEST = hashlib.sha256(UID_PLANTED.encode())
MADE = {
    "text": lambda: b"film,Quastelhuber^Zenobia,1\n",
    "other case": lambda: b"QUASTELHUBER",
    "two bytes a letter": lambda: "a film of Zenobia".encode("utf-16"),
    "uid among random bytes": lambda: np.random.default_rng(0).bytes(99_999) + UID_PLANTED.encode() + b"\0\xff",
    "member of a .keras": lambda: _zipped(b'{"name": "ZQPID00007"}'),
    "array of a .npz": _arrays,
    "member of a gzip": lambda: gzip.compress(b"born 1931-09-23"),
    "text of a PNG": lambda: _png(comment="ZQACC1", author="nobody"),
    "packed text of a PNG": lambda: _png(comment="ZQACC1" * 9, author="nobody", packed=True),
    "packed international text of a PNG": lambda: _png(comment="none", author="Wurzelsepp" * 9, packed=True),
    "picture in a page": lambda: (
        b'<img src="data:image/png;base64,'
        + base64.b64encode(_png(comment="none", author="Drosselmeyerin" * 9, packed=True))
        + b'">'
    ),
    "packed mask of a record": _record,
    "digest": lambda: b"key=" + DIGEST.hexdigest().encode(),
    "digest in capitals": lambda: DIGEST.hexdigest().upper().encode(),
    "digest cut short": lambda: b"film-" + DIGEST.hexdigest()[:12].encode() + b".png",
    "digest as bytes": lambda: b"\0\1\2" + DIGEST.digest()[:8] + b"\3",
    "digest as base64": lambda: base64.b64encode(DIGEST.digest()),
    "digest of another kind": lambda: hashlib.md5(UID_PLANTED.encode()).digest(),
}


@pytest.mark.parametrize("kind", MADE)
def test_the_search_finds_what_is_planted(kind, tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "file.bin").write_bytes(MADE[kind]())
    assert list(leaks(Search({UID_PLANTED}), tmp_path)) == ["inner/file.bin"]


def test_the_search_finds_names_of_files_and_nothing_where_nothing_is(tmp_path):
    (tmp_path / "clean.bin").write_bytes(
        np.random.default_rng(0).bytes(10**6) + _zipped(b"{}") + b"sha256: " + b"0" * 64
    )
    search = Search({UID_PLANTED})
    assert not leaks(search, tmp_path)
    (tmp_path / f"{UID_PLANTED}.mask.png").write_bytes(b"")
    assert list(leaks(search, tmp_path)) == [f"{UID_PLANTED}.mask.png"]
    assert not leaks(search, tmp_path, {UID_PLANTED})
    (tmp_path / "said.txt").write_text(f"{UID_PLANTED}.png of Zenobia")
    assert leaks(search, tmp_path, {UID_PLANTED}) == {"said.txt": {"patient's given name"}}


# --- films that carry it all ----------------------------------------------------------------------------------------


def plant(root: Path, *, studies: int, size: int, seed: int = 5) -> SimpleNamespace:
    """Generated films in SIIM's layout with everything planted, their files and folders named by UIDs, some broken.

    Returns:
        `root`, `values` (whose digests are searched for), `files`, `paths` (all that a film may be called) and `odd`
        (what is wrong -> file).
    """
    write_siim(root, studies=studies, size=size, seed=seed)
    numbers: dict[str, int] = {}
    values, names, films = set(), {}, {}

    def uid(kind: int, old: str) -> str:
        new = f"{WORDS['uid']}{kind}.{numbers.setdefault(old, 1000 + len(numbers))}"
        values.add(new)
        return new

    for old in sorted(root.glob("train/*/*/*.dcm")):
        film = pydicom.dcmread(old)
        study, series, image = (uid(kind, name) for kind, name in enumerate((*old.parts[-3:-1], old.stem), 1))
        patient = numbers.setdefault(film.PatientID, 1000 + len(numbers))
        names |= {old.parts[-3]: study, old.stem: image}
        _fill_in(film, patient, study, series, image)
        values |= {str(film.PatientID), str(film.PatientName), film.PatientBirthDate, film.AccessionNumber}
        new = root / "planted" / study / series / f"{image}.dcm"
        new.parent.mkdir(parents=True, exist_ok=True)
        film.save_as(new)
        films[image] = new
        old.unlink()
    for folder in sorted((root / "train").rglob("*"), reverse=True):
        folder.rmdir()
    (root / "train").rmdir()
    (root / "planted").rename(root / "train")
    for table in root.glob("*.csv"):
        text = table.read_text()
        for old_name, new_name in names.items():
            text = text.replace(old_name, new_name)
        table.write_text(text)
    files = [root / "train" / file.relative_to(root / "planted") for file in films.values()]
    paths = {str(part) for file in files for part in (file, file.relative_to(root / "train"), file.name, file.stem)}
    # A film that names no patient is in the manifest as its study's.
    values |= {f"study {file.parts[-3]}" for file in files}
    return SimpleNamespace(root=root, values=values, paths=paths, files=files, odd=_break(files))


def _fill_in(film: pydicom.Dataset, patient: int, study: str, series: str, image: str) -> None:
    film.PatientName = f"Quastelhuber{patient}^Zenobia"
    film.PatientID, film.OtherPatientIDs = f"ZQPID{patient}", [f"ZQOTH{patient}", "ZQOTH0"]
    film.PatientBirthDate, film.PatientBirthName = "19310923", "Quastelhuber^Zenobia"
    film.PatientAddress, film.PatientComments = "Klabautergasse 3", f"Habakukbemerkung zu Zenobia {patient}"
    film.StudyInstanceUID, film.SeriesInstanceUID, film.SOPInstanceUID = study, series, image
    film.FrameOfReferenceUID = film.DeviceUID = f"{WORDS['uid']}9.{patient}"
    film.AccessionNumber, film.StudyID = f"ZQACC{image[-4:]}", f"ZQSID{study[-4:]}"
    film.StudyDate = film.SeriesDate = film.AcquisitionDate = film.ContentDate = "20190317"
    film.StudyTime = film.SeriesTime = film.AcquisitionTime = film.ContentTime = "041733.271828"
    film.ReferringPhysicianName, film.OperatorsName = "Drosselmeyerin^Eulalia", ["Wurzelsepp^Alois"]
    film.PerformingPhysicianName = film.RequestingPhysician = "Drosselmeyerin^Eulalia"
    film.InstitutionName, film.InstitutionAddress = "Sanktquirin Klinik", "Klabautergasse 1"
    film.StationName, film.DeviceSerialNumber = "ZQSTAT1", "ZQSER4711"
    film.StudyDescription = film.SeriesDescription = film.ProtocolName = "Habakukbemerkung, Thorax"
    film.ImageComments = "Habakukbemerkung, Bild"
    film.ImageType = [*film.ImageType, "HABAKUKBEMERKUNG"]
    request = pydicom.Dataset()
    request.RequestedProcedureID, request.AccessionNumber = "ZQACC0", "ZQACC0"
    film.RequestAttributesSequence = [request]
    private = film.private_block(0x0011, "Zwiebelfisch", create=True)
    private.add_new(0x01, "LO", "Zwiebelfisch Quastelhuber")
    film.add_new(0x50000022, "LO", "Kurvenwort Zenobia")  # a curve's label
    film.add_new(0x60000010, "US", 8)
    film.add_new(0x60000011, "US", 8)
    film.add_new(0x60000022, "LO", "Kurvenwort Zenobia")
    film.add_new(0x60001500, "LO", "Kurvenwort")
    film.add_new(0x60003000, "OB", b"Kurvenwort" * 2)
    film.file_meta.MediaStorageSOPInstanceUID = UID(image)
    film.file_meta.SourceApplicationEntityTitle = "ZQAET1"


def _break(files: list[Path]) -> dict[str, Path]:
    """Spoils some films, each in a way that something is said of."""
    odd = dict(
        zip(("cut off", "no film", "inverted", "no window", "no view", "no patient", "frames"), files, strict=False)
    )
    odd["cut off"].write_bytes(odd["cut off"].read_bytes()[:-900])
    odd["no film"].write_bytes(b"Quastelhuber^Zenobia, ZQPID0, " * 20)
    for name, change in {
        "inverted": lambda film: {
            "PhotometricInterpretation": {"MONOCHROME1": "MONOCHROME2"}.get(
                film.PhotometricInterpretation, "MONOCHROME1"
            )
        },
        "no window": lambda film: {"WindowCenter": 100, "WindowWidth": 0},
        "no view": lambda film: {"ViewPosition": ""},
        "no patient": lambda film: {"PatientID": "", "PatientAge": None},
        "frames": lambda film: {"NumberOfFrames": 3},
    }.items():
        film = pydicom.dcmread(odd[name])
        film.update(change(film))
        film.save_as(odd[name])
    return odd


@pytest.fixture(scope="module")
def few(tmp_path_factory) -> SimpleNamespace:
    return plant(tmp_path_factory.mktemp("few") / "siim", studies=12, size=64)


def test_everything_is_planted(few):
    film = few.files[-1].read_bytes().decode("latin-1")
    assert [what for what, word in WORDS.items() if word not in film] == ["birth date as people write it"]
    assert len(Search(few.values)(film.encode("latin-1"))) == len(WORDS) - 1
    manifest = _manifest(few)
    assert {"ZQPID", "study", "1.2.8"} == {
        text[:5] for column in ("patient_id", "study_id") for text in manifest[column]
    }


def _manifest(planted: SimpleNamespace):
    with pytest.warns(UserWarning):
        return read_siim(planted.root)


# --- quick: what is said of broken films, and shards ----------------------------------------------------------------


def test_shards_and_what_inspection_says(few, tmp_path, monkeypatch, recwarn):
    words = []
    from PIL.ImageDraw import ImageDraw

    whole = ImageDraw.text
    monkeypatch.setattr(
        ImageDraw, "text", lambda self, at, text, *a, **k: words.append(text) or whole(self, at, text, *a, **k)
    )
    manifest = read_siim(few.root)
    shards = prepare(manifest, tmp_path / "shards", storage_size=64, workers=1)
    assert shards.rejected == 3 and shards.noted >= 2
    local = {name: (tmp_path / "shards" / name).read_text() for name in LOCAL}
    assert all(few.odd[name].name in local["rejected.csv"] for name in ("cut off", "no film", "frames"))
    assert all(few.odd[name].name in local["noted.csv"] for name in ("inverted", "no window"))
    page = str(inspect_films(manifest, tmp_path / "sheet.png", decode=True))
    assert all(few.odd[name].name in page for name in ("cut off", "no film", "no view"))
    assert "Typical Appearance" in " ".join(words)
    (tmp_path / "said.txt").write_text("\n".join([page, *words, *(str(warning.message) for warning in recwarn)]))
    search = Search(few.values)
    # A film that has to be looked for is called by its path below the data set's folder, or by its file's name.
    assert not leaks(search, tmp_path, few.paths)
    assert not leaks(search, tmp_path / "shards")


def _with(file: Path, tag: int, vr: str, value: bytes) -> bytes:
    """A film's bytes with an element's value replaced as it stands there; pydicom would refuse to write it."""
    content = file.read_bytes()
    head = tag.to_bytes(4, "little")
    head = head[2:] + head[:2] + vr.encode()
    at = content.index(head) + 6
    length = int.from_bytes(content[at : at + 2], "little")
    return content[:at] + len(value).to_bytes(2, "little") + value + content[at + 2 + length :]


@pytest.mark.parametrize(
    ("tag", "vr", "value"),
    [
        (0x00280010, "US", b"Quastelhuber^Zenobia."),  # rows: of an odd length
        (0x00281050, "DS", b"Quastelhuber^Zenobia"),  # window center
        (0x00281052, "DS", b"Quastelhuber^Zenobia"),  # rescale intercept
        (0x00280004, "CS", b"Quastelhuber^Zenobia"),  # photometric interpretation
        (0x00020010, "UI", b"Quastelhuber^Zenobia"),  # transfer syntax
    ],
    ids=lambda value: f"{value:08x}" if isinstance(value, int) else None,
)
def test_no_reason_quotes_a_film(few, tag, vr, value):
    """What slips into another element, by a damaged length or a slip of the hand, is not handed on as a reason."""
    plain = [file for file in few.files if file not in few.odd.values()]
    plain = [f for f in plain if pydicom.dcmread(f).file_meta.TransferSyntaxUID == "1.2.840.10008.1.2.1"]
    film = _with(next(file for file in plain if "WindowCenter" in pydicom.dcmread(file)), tag, vr, value)
    with pytest.raises(CxrError) as raised:
        read_radiograph(film)
    said = [str(raised.value)]
    try:
        said.append(repr(read_header(film)))
    except CxrError as error:
        said.append(str(error))
    assert not [text for text in said if Search(few.values)(text.encode())]


@pytest.mark.parametrize("column", ["patient_id", "study_id", "image"])
def test_a_filter_that_fits_no_film_lists_no_patients(few, column):
    manifest = _manifest(few)
    near = manifest[column].iloc[0] + "0"
    with pytest.raises(CxrError) as raised:
        rows_where(manifest, {column: [near]})
    assert not Search(few.values)(str(raised.value).replace(near, "").encode())


# --- slow: every command, its terminal included ---------------------------------------------------------------------

# All commands in one process, for TensorFlow takes long to start. What each says goes to files; what is drawn as
# letters on pictures is written down too, for nobody can search a picture.
SCRIPT = """
import json, os, sys
from pathlib import Path

def log_drawn(path):
    from matplotlib.text import Text
    from PIL.ImageDraw import ImageDraw
    log = path.open("a", encoding="utf-8")
    def wrapped(whole, words):
        def draw(*arguments, **options):
            print(words(*arguments, **options), file=log, flush=True)
            return whole(*arguments, **options)
        return draw
    ImageDraw.text = wrapped(ImageDraw.text, lambda self, at, text, *a, **k: text)
    Text.draw = wrapped(Text.draw, lambda self, *a, **k: self.get_text())

def main(folder, commands):
    from cxr_tf.cli import main as command_line
    log_drawn(folder / "drawn.txt")
    codes = []
    for number, command in enumerate(commands):
        for stream, name in ((1, "out"), (2, "err")):
            (sys.stdout if stream == 1 else sys.stderr).flush()
            os.dup2(os.open(folder / f"{number:02}-{command[0]}.{name}", os.O_WRONLY | os.O_CREAT), stream)
        sys.argv = ["cxr-tf", *command]
        try:
            command_line()
        except SystemExit as end:
            codes.append(end.code or 0)
    (folder / "codes.json").write_text(json.dumps(codes))

if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
"""

EXPERIMENT = """
name = "tiny"
seed = 3
[data]
shards = "{shards}"
[data.split]
folds = 3
[model]
encoder = "small_resnet"
size = 32
hidden = 8
decoder_channels = [8, 8, 8, 8, 8]
[train]
steps = 2
batch_size = 8
checkpoint_every = 2
validate_every = 2
log_every = 1
[evaluate]
challenge = "siim"
replicates = 100
"""

PRETRAINING = """
name = "tiny-pretraining"
method = "inpainting"
[data]
shards = "{shards}"
test_of = "{experiment}"
validation = 0.2
[model]
encoder = "small_resnet"
size = 32
[inpainting]
skips = true
decoder_channels = [8, 8, 8, 8, 8]
[probe]
classes = ["Negative for Pneumonia", "Typical Appearance"]
[train]
steps = 2
batch_size = 8
checkpoint_every = 2
validate_every = 2
log_every = 1
"""

TABLE = """
name = "table"
[data]
shards = "none"
[table]
csv = "films.csv"
image = "file"
patient = "person"
study = "study"
label = "finding"
classes = { None = ["none"], Some = ["some"] }
keep = ["institution", "born"]
"""


def _pictures(folder: Path, films: SimpleNamespace) -> None:
    """PNG and JPEG files of some films with names in what they carry beside their pixels, and a table of them."""
    folder.mkdir()
    rows = []
    for number, file in enumerate(file for file in films.files if file not in films.odd.values()):
        if number == 10:
            break
        picture, name = Image.fromarray(read_radiograph(file)), f"{number}.{'png' if number % 2 else 'jpg'}"
        if number % 2:
            info = PngImagePlugin.PngInfo()
            info.add_text("Author", "Quastelhuber^Zenobia")
            info.add_text("Comment", "ZQPID1 ZQACC1", zip=True)
            info.add_itxt("Title", "Habakukbemerkung", zip=True)
            picture.save(folder / name, pnginfo=info, dpi=(72, 72))
        else:
            exif = Image.Exif()
            exif[0x010E], exif[0x013B] = "Quastelhuber^Zenobia, Habakukbemerkung", "Drosselmeyerin"
            picture.save(folder / name, exif=exif, comment="ZQPID1 ZQACC1")
        rows.append((name, f"ZQPID{number // 2}", f"ZQACC{number}", ("none", "some")[number // 2 % 2]))
    (folder / "9.png").write_bytes((folder / "9.png").read_bytes()[:-200])
    with (folder / "films.csv").open("w", newline="") as table:
        writer = csv.writer(table)
        writer.writerow(("file", "person", "study", "finding", "institution", "born"))
        writer.writerows((*row, "Sanktquirin", "1931-09-23") for row in rows)


@pytest.fixture(scope="module")
def everything(tmp_path_factory) -> SimpleNamespace:
    """All outputs of all commands on planted films, below `out`; what their terminals said, in `terminal`."""
    root = tmp_path_factory.mktemp("everything")
    films = plant(root / "siim", studies=60, size=64)
    _pictures(root / "pictures", films)
    out, terminal, local = root / "out", root / "terminal", root / "local"
    for folder in (out, terminal, local):
        folder.mkdir()
    experiment, pretraining, table = (root / f"{name}.toml" for name in ("experiment", "pretraining", "table"))
    experiment.write_text(EXPERIMENT.format(shards=out / "shards"))
    pretraining.write_text(PRETRAINING.format(shards=out / "shards", experiment=experiment))
    table.write_text(TABLE)
    # What is audited has patients on two sides and films that cannot be read, and is compared with copies of itself.
    manifest = _manifest(films)
    save_manifest(
        manifest.assign(split=["test", "train"] * (len(manifest) // 2) + ["test"] * (len(manifest) % 2)),
        local / "siim.csv",
    )
    (local / "readers.csv").write_text("film,reader,label\nZQPID1,A,Quastelhuber^Zenobia\n")
    torn = ["--set", 'data.split={column="view", train=["AP"], test=["PA"]}']
    plain = [file for file in films.files if file not in films.odd.values()][:2]
    run, export = out / "run", out / "run" / "export" / "savedmodel" / "1"
    commands = [
        (0, "prepare", "siim", films.root, "--out", out / "shards", "--storage-size", "64", "--workers", "1"),
        (
            1,
            "prepare",
            "siim",
            films.root,
            "--out",
            out / "strict",
            "--storage-size",
            "64",
            "--workers",
            "1",
            "--strict",
        ),
        (0, "prepare", "table", root / "pictures", "--config", table, "--out", out / "pictures", "--workers", "1"),
        (0, "prepare", "siim", films.root, "--out", out / "parts", "--worker", "0/1", "--workers", "1"),
        (0, "prepare", "siim", films.root, "--out", out / "parts", "--merge"),
        (0, "inspect", "siim", films.root, "--sheet", out / "sheet.png", "--decode"),
        (1, "audit", local / "siim.csv", out / "pictures", "--out", out / "audit"),
        (0, "pretrain", pretraining, "--out", out / "pretrained"),
        (0, "probe", out / "pretrained", "--experiment", experiment, "--fractions", "1.0"),
        (1, "train", experiment, "--out", out / "torn", *torn),
        (0, "train", experiment, "--out", run, "--set", f"model.weights={out / 'pretrained' / 'encoder.keras'}"),
        (0, "evaluate", run),
        (1, "evaluate", run, "--readers", local / "readers.csv"),
        (0, "train", experiment, "--out", out / "other", "--set", "seed=4"),
        (0, "evaluate", out / "other"),
        (0, "compare", run, out / "other", "--out", out / "compared"),
        (0, "export", run),
        (0, "predict", export, *(root / "pictures" / name for name in ("0.jpg", "1.png")), "--out", out / "predicted"),
        (1, "predict", run, *plain, *films.odd.values(), "--out", out / "predicted-dicom"),
        (1, "predict", run, films.odd["no film"], films.odd["cut off"], "--out", out / "none"),
    ]
    script = root / "script.py"
    script.write_text(SCRIPT)
    given = json.dumps([[str(word) for word in command] for _, *command in commands])
    done = subprocess.run([sys.executable, script, terminal, given], timeout=400)
    assert done.returncode == 0, max(terminal.iterdir()).read_text()[-3000:]
    codes = json.loads((terminal / "codes.json").read_text())
    for number, (command, code) in enumerate(zip(commands, codes, strict=True)):
        said = (terminal / f"{number:02}-{command[1]}.err").read_text()
        assert code == command[0], f"{command}: {said[-3000:]}"
    return SimpleNamespace(out=out, terminal=terminal, films=films, search=Search(films.values))


@pytest.mark.slow
def test_no_file_holds_what_was_planted(everything):
    out = everything.out
    for made in ("shards/shards.json", "run/metrics.jsonl", "run/evaluation/figures/films.png", "audit/unread.csv"):
        assert (out / made).stat().st_size
    assert "data:image/png" in (out / "audit" / "audit.html").read_text()
    pairs, sides, unread = ((out / "audit" / f"{name}.csv").read_text() for name in ("pairs", "sides", "unread"))
    assert "copy" in pairs and "patient" in sides and "truncated" in unread
    local = (out / "shards" / "manifest.csv").read_bytes(), (out / "shards" / "rejected.csv").read_bytes()
    assert [everything.search(table) for table in local] == [{"patient id", "uid"}, {"uid"}]  # it would be found
    found = leaks(everything.search, out)
    # What `predict` makes is of the films that it was given, and is named after them.
    assert {name for name in found if not name.startswith("predicted-dicom/")} == set()
    assert {Path(name).name for name in found if not name.endswith(".png")} == {"predictions.csv"}
    assert not leaks(everything.search, out / "predicted-dicom", everything.films.paths)


@pytest.mark.slow
def test_no_terminal_says_what_was_planted(everything):
    said = {file.name: file.read_text() for file in everything.terminal.iterdir()}
    assert "rejected" in said["00-prepare.out"] and "cannot be prepared" in said["01-prepare.err"]
    assert "FAILED" in said["06-audit.out"] and "not read" in said["18-predict.err"]
    assert not leaks(everything.search, everything.terminal, everything.films.paths)
    # Films are named by what looks at them, and where their patients are on two sides (9); what learns names none.
    named = {name[:2] for name in leaks(everything.search, everything.terminal)}
    assert named == {"00", "01", "03", "04", "05", "09", "18", "19"}


@pytest.mark.slow
def test_a_record_knows_a_film_by_whole_numbers(everything):
    shards = open_shards(everything.out / "shards")
    assert set(shards.manifest["patient_id"].str[:5]) <= {"ZQPID", "study"}
    records = b"".join(shards.read(range(len(shards))))
    assert b"patient_key" in records and not everything.search(records)
    assert load_manifest(everything.out / "pictures" / "manifest.csv")["born"].eq("1931-09-23").all()
