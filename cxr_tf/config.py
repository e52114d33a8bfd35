"""The experiment file: typed sections in TOML, overrides, and errors that name the key.

Only the command line and the recipes that it starts read this; library functions take plain arguments. Every key has a
default that is either FIELD's documented substitute for the paper's unpublished one or the plainest choice, and a run
folder keeps the resolved file, defaults included.
"""

from __future__ import annotations

import inspect
import json
import os
import tomllib
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PureWindowsPath
from typing import Any, Literal, Self, TypeVar, Union

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, field_validator, model_validator

from cxr_tf.errors import CxrError, nearest


class ConfigError(CxrError):
    """An experiment file that cannot be used; the text names the key, what it takes and the nearest known key."""


class Section(BaseModel):
    """A table of the experiment file: unknown keys, wrong types, `inf` and `nan` are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


Fraction = typing.Annotated[float, Field(ge=0.0, le=1.0)]
Positive = typing.Annotated[float, Field(gt=0.0)]
NotNegative = typing.Annotated[float, Field(ge=0.0)]
Count = typing.Annotated[int, Field(ge=1)]
Size = typing.Annotated[int, Field(ge=32, le=4096, multiple_of=32)]
HeadWeights = typing.Annotated[list[NotNegative], Field(min_length=2, max_length=2)]
Value = str | int | float | bool


class TableSection(Section):
    """How `prepare table` reads a CSV: which of its columns mean what (see `cxr_tf.data.readers.table`)."""

    csv: str = Field("metadata.csv", description="the CSV file, relative to the root")
    image: str = Field("image", description="column of image paths, relative to the root")
    patient: str = Field("patient_id", description="column of patient keys")
    study: str | None = Field(None, description="column of study keys; without it each image is a study of its own")
    source: str | None = Field(None, description="column that names where a film comes from")
    view: str | None = Field(None, description="column of views (PA, AP, ...)")
    sex: str | None = Field(None, description="column of sexes")
    age: str | None = Field(None, description="column of ages in years")
    label: str | None = Field(None, description="one column that names the class of each film")
    classes: dict[str, list[str]] | None = Field(
        None, description="class name = the values of the label column that mean it; values left out are an error"
    )
    label_columns: dict[str, str] | None = Field(
        None, description="class name = its own column of 1, 0 or blank (unknown), for films with several labels"
    )
    label_separator: str | None = Field(None, description='the label column holds several values, joined by this: "|"')
    ignore: list[str] = Field(
        [],
        description="values of the label column that are no class: without a known label, or, with a separator, none",
    )
    where: dict[str, list[Value]] = Field({}, description="column = values: only rows that have them are read")
    mask: str | None = Field(None, description="column of mask paths, relative to the root")
    mask_where: dict[str, list[Value]] = Field({}, description="column = values: only masks of rows that have them")
    mask_empty: str | None = Field(None, description="column that is 1 where a film is known to have nothing to mask")
    boxes: str | None = Field(None, description="column of boxes, [[x, y, width, height], ...] in original pixels")
    keep: list[str] = Field([], description="columns to carry along, for splits and filters")

    @field_validator("csv")
    @classmethod
    def _inside_the_root(cls, value: str) -> str:
        path = PureWindowsPath(value)  # knows both kinds of slash, and drives
        if path.anchor or ".." in path.parts or not path.parts:
            raise ValueError('must be a file inside the root: no absolute path, no ".."')
        return value


class SplitSection(Section):
    """Which patients train, which choose, which are reported."""

    column: str | None = Field(None, description="a column of the manifest that gives the parts")
    train: list[Value] = Field([], description="values of the column that train")
    test: list[Value] = Field([], description="values of the column that are reported")
    folds: int = Field(5, ge=2, description="without a column: patient-wise stratified folds")
    fold: int = Field(0, ge=0, description="without a column: the fold that is reported, from 0")
    validation: float = Field(0.15, gt=0.0, lt=1.0, description="patient-wise part of the training films that chooses")
    seed: int = Field(0, ge=0, description="of the folds and of the validation part")

    @model_validator(mode="after")
    def _column_or_folds(self) -> SplitSection:
        if self.column is not None and not (self.train and self.test):
            raise ValueError("with `column`, `train` and `test` say which of its values go where")
        if self.column is None and (self.train or self.test):
            raise ValueError("`train` and `test` are values of a `column`: name it")
        if self.column is None and self.fold >= self.folds:
            raise ValueError(f"`fold` counts from 0 to folds - 1 = {self.folds - 1}")
        return self


class DataSection(Section):
    """What is trained on."""

    shards: str = Field(description="folder that `cxr-tf prepare` wrote")
    classes: list[str] | None = Field(None, description="classes to learn; all of the shards' by default")
    task: Literal["multiclass", "multilabel"] = Field(
        "multiclass", description="one class a film (softmax) or any number of them (sigmoid)"
    )
    where: dict[str, list[Value]] = Field({}, description="column = values: only films that have them")
    split: SplitSection = SplitSection()
    label_fraction: float = Field(
        1.0, gt=0.0, le=1.0, description="part of the training patients that is used, drawn by the seed"
    )

    @field_validator("classes")
    @classmethod
    def _each_once(cls, value: list[str] | None) -> list[str] | None:
        if value is not None and (not value or len(set(value)) < len(value)):
            raise ValueError("must name at least one class, and none of them twice")
        return value


class EncoderSection(Section):
    """What turns a film into features."""

    encoder: str = Field("densenet121", description="a name from cxr_tf.models.encoders")
    size: Size = Field(320, description="side of the square input in pixels, a multiple of 32")
    weights: str | None = Field(None, description='"imagenet", or an encoder.keras of a run')
    normalization: Literal["batch", "synchronized", "group"] = Field(
        "batch", description="fused batch-norm per replica, batch-norm over all replicas, or GroupNorm"
    )


class ModelSection(EncoderSection):
    """Encoder, heads and normalization."""

    decoder_weights: str | None = Field(None, description="a reconstruction.keras of an inpainting run with skips")
    classification: bool = Field(True, description="has a classification head")
    segmentation: bool = Field(True, description="has a U-Net segmentation head")
    hidden: int = Field(1024, ge=0, description="units between pooled features and classes; 0 for none")
    dropout: float = Field(0.5, ge=0.0, lt=1.0, description="before the last layer of the classification head")
    decoder_channels: list[Count] = Field(
        [256, 128, 64, 32, 16], min_length=5, max_length=5, description="of the decoder, from stride 16 to stride 1"
    )


class LossSection(Section):
    """How the two heads are judged while training."""

    head_weights: HeadWeights | Literal["uncertainty"] = Field(
        [0.6, 0.4], description='[classification, segmentation], or "uncertainty" (Kendall et al. 2018)'
    )
    class_weights: list[Positive] | None = Field(None, description="one weight a class, in the order of the classes")
    label_smoothing: float = Field(0.0, ge=0.0, lt=1.0)
    focal_gamma: NotNegative = Field(0.0, description="focusing exponent of the focal loss; 0 is cross-entropy")

    @field_validator("head_weights")
    @classmethod
    def _one_counts(cls, value: list[float] | str) -> list[float] | str:
        if isinstance(value, list) and not any(value):
            raise ValueError("at least one of the two weights must be above 0")
        return value


class DistillationSection(Section):
    """A run whose model teaches this one (see `cxr_tf.train.distillation.Distillation`)."""

    run: str = Field(description="folder of a finished run on the same shards and split")
    weight: Fraction = Field(0.5, description="of the teacher's part of each head's loss; the truth has the rest")
    temperature: Positive = Field(2.0, description="both models' logits are divided by it")


class OptimizationSection(Section):
    """The optimizer, its schedule, and what is kept."""

    steps: Count = Field(1000, description="updates of the weights")
    batch_size: Count = Field(32, description="films an update, over all devices")
    optimizer: Literal["adamw", "sgd", "lamb"] = "adamw"
    learning_rate: Positive = Field(1e-4, description="at the end of the warm-up; then a cosine to 0")
    warmup_steps: int = Field(0, ge=0)
    weight_decay: NotNegative = 1e-4
    momentum: float = Field(0.9, ge=0.0, lt=1.0, description="of SGD")
    clip_norm: Positive | None = Field(None, description="global norm that gradients are clipped to")
    ema: float | None = Field(None, gt=0.0, lt=1.0, description="momentum of a running average of the weights")
    precision: Literal["float32", "mixed_float16", "mixed_bfloat16"] = "float32"
    deterministic: bool = Field(True, description="the same seed gives the same weights, at some cost on GPUs")
    checkpoint_every: Count = Field(200, description="steps")
    keep_checkpoints: Count = 2
    validate_every: Count = Field(200, description="steps between figures on validation patients")
    log_every: Count = Field(20, description="steps")

    @model_validator(mode="after")
    def _warmup_ends(self) -> Self:
        if self.warmup_steps >= self.steps:
            raise ValueError(f"`warmup_steps` ({self.warmup_steps}) must be below `steps` ({self.steps})")
        return self


class TrainSection(OptimizationSection):
    """The same for both heads; the weights with the best validation figure are kept."""

    freeze_encoder: bool = Field(False, description="a linear probe: the encoder stays as its weights are")


class AugmentSection(Section):
    """Ranges of the random changes (see `cxr_tf.data.augment.Augment`); 0 switches one off."""

    flip: Fraction = Field(0.5, description="probability of a left-right flip")
    rotation: float = Field(10.0, ge=0.0, le=180.0, description="degrees to either side")
    scale: list[Positive] = Field([0.9, 1.1], min_length=2, max_length=2, description="smallest and largest zoom")
    shift: Fraction = Field(0.05, description="part of the side, to either side")
    crop: float = Field(0.0, ge=0.0, lt=1.0, description="largest part of the square that is cut away")
    aspect: float = Field(1.0, ge=1.0, le=10.0, description="largest ratio of the sides of what a crop leaves")
    brightness: Fraction = Field(0.1, description="part of the range, up or down")
    contrast: Fraction = Field(0.2, description="part, up or down")
    gamma: float = Field(0.2, ge=0.0, le=10.0, description="part, up or down")
    noise: Fraction = Field(0.02, description="largest standard deviation, as part of the range")
    blur: Fraction = Field(0.1, description="probability of a blur")
    erase: Fraction = Field(0.0, description="probability of an erased rectangle")

    @field_validator("scale")
    @classmethod
    def _smaller_first(cls, value: list[float]) -> list[float]:
        if value[0] > value[1]:
            raise ValueError("the smaller zoom comes first")
        return value


class EvaluateSection(Section):
    """How the figures are made."""

    replicates: int = Field(1000, ge=100, description="of the patient-clustered bootstrap")
    challenge: Literal["siim"] | None = Field(None, description="also the challenge's own figure")
    ordered: bool = Field(False, description="the classes are in order of severity: also quadratic kappa")
    lungs: str | None = Field(
        None, description="where lung fields are from: a folder of shards, or a run that finds them"
    )


_NAME = "of the run folder: letters, digits, dots, dashes and underscores; a letter or a digit first"
_NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"


class Experiment(Section):
    """One experiment file."""

    name: str = Field(pattern=_NAME_PATTERN, description=_NAME)
    seed: int = Field(0, ge=0, lt=2**31)
    dataset: dict[str, Any] | None = Field(None, description="options of the data set's reader, for `cxr-tf prepare`")
    table: TableSection | None = None
    data: DataSection
    model: ModelSection = ModelSection()
    augment: AugmentSection = AugmentSection()
    loss: LossSection = LossSection()
    distillation: DistillationSection | None = None
    train: TrainSection = TrainSection()
    evaluate: EvaluateSection = EvaluateSection()


class UnlabeledSection(Section):
    """What is pre-trained on: films, whatever is known of them."""

    shards: str = Field(description="folder that `cxr-tf prepare` wrote")
    where: dict[str, list[Value]] = Field({}, description="column = values: only films that have them")
    holdout: dict[str, list[Value]] = Field(
        {}, description="column = values: films that are left for tests, with all other films of their patients"
    )
    test_of: str | None = Field(
        None, description="an experiment file of `cxr-tf train`: what it tests on is left for tests, too"
    )
    validation: float = Field(
        0.05, gt=0.0, lt=1.0, description="patient-wise part that is not trained on, for figures on the way"
    )
    seed: int = Field(0, ge=0, description="of the validation part")


class MoCoSection(Section):
    """Momentum contrast (see `cxr_tf.MoCo`); the defaults are MoCo-CXR's."""

    dim: Count = Field(128, description="length of an embedding")
    queue: Count = Field(24_576, description="keys in the queue; at most the films that are trained on")
    temperature: Positive = 0.2
    momentum: Fraction = Field(0.999, description="part of the key network that a step keeps")
    momentum_schedule: Literal["constant", "cosine"] = Field("constant", description="cosine lets it rise to 1")
    head: Literal["v1", "v2"] = Field("v2", description="one layer, or two")
    symmetric: bool = Field(False, description="each view is query and key once")
    parts: Count = Field(4, description="least number of parts of a batch with batch-norm of their own")
    views: Literal["moco-cxr", "moco-v2", "augment"] = Field(
        "moco-cxr", description="how the two views differ; the last takes the ranges of [augment]"
    )


class InpaintingSection(Section):
    """Filling holes (see `cxr_tf.Inpainting`)."""

    holes: Literal["lung", "center", "blocks"] = Field("lung", description="one lung's side, the center, or anywhere")
    decoder_channels: list[Count] = Field(
        [512, 256, 128, 64, 32], min_length=5, max_length=5, description="from stride 16 to stride 1"
    )
    skips: bool = Field(False, description="with them the decoder can start a segmentation decoder")
    whole_image: bool = Field(False, description="the loss is over the whole film, not over the hole alone")
    adversarial: float = Field(0.0, ge=0.0, lt=1.0, description="weight of the adversarial loss; Belli et al.: 0.002")
    discriminator_learning_rate: Positive = 2e-4


class JointSection(Section):
    """Both pretext tasks on one encoder (see `cxr_tf.Joint`)."""

    weights: HeadWeights = Field([1.0, 1.0], description="[MoCo, inpainting]")


class ProbeSection(Section):
    """What a nearest-neighbor probe on the way looks at; needs labels of some films."""

    classes: list[str] = Field(min_length=1, description="classes to tell apart")
    task: Literal["multiclass", "multilabel"] = "multiclass"
    where: dict[str, list[Value]] = Field({}, description="column = values: only films that have them")


class Pretraining(Section):
    """One experiment file of `cxr-tf pretrain`."""

    name: str = Field(pattern=_NAME_PATTERN, description=_NAME)
    seed: int = Field(0, ge=0, lt=2**31)
    method: Literal["moco", "inpainting", "joint"]
    dataset: dict[str, Any] | None = Field(None, description="options of the data set's reader, for `cxr-tf prepare`")
    data: UnlabeledSection
    model: EncoderSection = EncoderSection()
    augment: AugmentSection = AugmentSection()
    moco: MoCoSection = MoCoSection()
    inpainting: InpaintingSection = InpaintingSection()
    joint: JointSection = JointSection()
    probe: ProbeSection | None = None
    train: OptimizationSection = OptimizationSection()


Root = TypeVar("Root", Experiment, Pretraining)
Listed = TypeVar("Listed", bound=Section)


def load_experiment(
    path: str | os.PathLike[str],
    overrides: list[str] | tuple[str, ...] = (),
    kind: type[Root] = Experiment,  # type: ignore[assignment]
) -> Root:
    """Reads an experiment file and applies `section.key=value` overrides, values in TOML (bare words are strings).

    Args:
        path: the file.
        overrides: what is set from outside.
        kind: `Experiment` (for `cxr-tf train`) or `Pretraining` (for `cxr-tf pretrain`).

    Raises:
        ConfigError: for a missing file, bad TOML, an unknown key, or a value of the wrong type or range.

    Example:
        >>> load_experiment("experiments/siim/multitask.toml", ["train.steps=500"])  # doctest: +SKIP
    """
    return parse_experiment(_read_toml(Path(path)), overrides, where=str(path), kind=kind)


def load_table(path: str | os.PathLike[str]) -> TableSection:
    """Reads only the `[table]` section of an experiment file: how `prepare table` maps a CSV's columns.

    Raises:
        ConfigError: as `load_experiment`, and when the file has no such section.
    """
    settings = _read_toml(Path(path))
    if "table" not in settings:
        raise ConfigError(f"{path}: has no [table] section, which says what the columns of the CSV mean.")
    return _validated(TableSection, settings["table"], str(path), ("table",))


def load_options(path: str | os.PathLike[str], reader: Callable[..., Any]) -> dict[str, Any]:
    """Reads only the `[dataset]` section of an experiment file: options of a data set's reader.

    Args:
        path: the file.
        reader: function whose keyword-only parameters the section may set, but for `progress`; their annotations and
            defaults say what they take.

    Returns:
        What the file sets.

    Raises:
        ConfigError: as `load_experiment`.
    """
    parameters = inspect.signature(reader, eval_str=True).parameters.values()
    fields: dict[str, Any] = {
        p.name: (p.annotation, p.default) for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "progress"
    }
    section = create_model("DatasetSection", __base__=Section, **fields)
    settings = _read_toml(Path(path)).get("dataset", {})
    found = _validated(section, settings, str(path), ("dataset",))
    return {name: getattr(found, name) for name in settings}


def load_list(path: str | os.PathLike[str], name: str, kind: type[Listed]) -> list[Listed]:
    """Reads a file of nothing but `[[name]]` tables.

    Args:
        path: the file.
        name: of the tables.
        kind: what each of them is.

    Raises:
        ConfigError: as `load_experiment`, and when there is no such table, or something else.
    """
    settings = _read_toml(Path(path))
    tables = settings.get(name)
    if list(settings) != [name] or not (isinstance(tables, list) and all(isinstance(table, dict) for table in tables)):
        raise ConfigError(f"{path}: takes [[{name}]] tables alone. Received: {', '.join(settings) or 'nothing'}.")
    return [_validated(kind, table, f"{path}: [[{name}]] number {i}", ()) for i, table in enumerate(tables, start=1)]


def parse_experiment(
    settings: dict[str, Any],
    overrides: list[str] | tuple[str, ...] = (),
    *,
    where: str = "experiment",
    kind: type[Root] = Experiment,  # type: ignore[assignment]
) -> Root:
    """Validates settings that are already a dictionary; `where` names them in errors. See `load_experiment`."""
    settings = json.loads(json.dumps(settings, default=str))
    for override in overrides:
        _override(settings, override)
    if kind is Experiment and "method" in settings:
        raise ConfigError(f"{where}: has a `method`, so it is of a pre-training: give it to `cxr-tf pretrain`.")
    if kind is Pretraining and "method" not in settings and "loss" in settings:
        raise ConfigError(f"{where}: has no `method`, but a `loss` of two heads: give it to `cxr-tf train`.")
    return _validated(kind, settings, where, ())


_NO_TRAINING: dict[str, Any] = {"dataset": True, "table": True, "evaluate": True, "data": {"shards": True}}


def differences(old: Section, new: Section) -> list[str]:
    """The keys in which two trainings differ, a line each: `train.steps: 100 there, 200 asked for`.

    What does not touch the training is left out, so that it never locks a run: all of `dataset.` and `table.` (used
    before, by `prepare`) and `evaluate.` (used after), and `data.shards`, since a folder may move: the hash of its data
    tells whether it is the same.
    """
    before, after = (_flat(e.model_dump(mode="json", exclude=_NO_TRAINING)) for e in (old, new))
    return [
        f"{key}: {before.get(key)} there, {after.get(key)} asked for"
        for key in sorted(before | after)
        if before.get(key) != after.get(key)
    ]


def to_toml(settings: dict[str, Any], prefix: str = "") -> str:
    """Writes nested dictionaries of plain values as TOML; `None` is left out, since TOML has no word for it."""
    plain = {k: v for k, v in settings.items() if v is not None and not isinstance(v, dict)}
    tables = {k: v for k, v in settings.items() if isinstance(v, dict)}
    lines = [f"{_key(k)} = {_plain(v)}" for k, v in plain.items()]
    for name, table in tables.items():
        path = f"{prefix}{_key(name)}"
        lines += ["", f"[{path}]", to_toml(table, f"{path}.").rstrip("\n")]
    return "\n".join(lines).lstrip("\n").rstrip("\n") + "\n"


def _key(name: str) -> str:
    bare = name.isascii() and name.replace("_", "").replace("-", "").isalnum()
    return name if bare else _plain(name)


def _plain(value: Any) -> str:
    # JSON's words are TOML's, but for one character that JSON leaves as it is.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such experiment file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}).") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: is not valid TOML: {error}.") from None


def _override(settings: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not all(part.strip() for part in key.split(".")):
        raise ConfigError(f'--set takes section.key=value, for example train.steps=500. Received: "{override}".')
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    *sections, last = (part.strip() for part in key.split("."))
    for section in sections:
        settings = settings.setdefault(section, {})
        if not isinstance(settings, dict):
            raise ConfigError(f'--set {override}: "{section}" is a value, not a section.')
    settings[last] = value


def _validated(kind: type[Section], settings: Any, where: str, prefix: tuple[str, ...]) -> Any:
    try:
        return kind.model_validate(settings)
    except ValidationError as error:
        lines: dict[str, str] = {}
        # The branches of a union, and the items of a list, each have an error: a key gets one line, the telling one.
        for problem in sorted(error.errors(), key=lambda e: _is_type_error(e["type"])):
            key, line = _explain(kind, problem, settings, prefix)
            lines.setdefault(key, line)
        raise ConfigError(f"{where}: " + "\n  ".join(lines.values())) from None


def _is_type_error(kind: str) -> bool:
    """Whether saying what the key takes says all there is to say."""
    return kind.endswith("_type") or kind in ("literal_error", "string_pattern_mismatch", "too_short", "too_long")


def _explain(root: type[Section], error: Any, settings: Any, prefix: tuple[str, ...]) -> tuple[str, str]:
    """One validation error: its key, and a line that says what is wrong, what the key takes and what was received."""
    kind, loc = error["type"], error["loc"]
    if kind in ("missing", "extra_forbidden"):
        section = root
        for part in loc[:-1]:
            section = _section_of(section.model_fields[part].annotation) or section
        key = ".".join((*prefix, *loc))
        if kind == "missing":
            return key, f"`{key}` is missing. It takes {_takes(section.model_fields[loc[-1]])}."
        hint = nearest(loc[-1], section.model_fields)
        return key, f"unknown key `{key}`.{hint} Known here: {', '.join(section.model_fields)}."

    annotation: Any = root
    takes, received, keys = _type_words(root), settings, list(prefix)
    for part in loc:  # the file's own keys; then come positions in lists and branches of unions
        if section_here := _section_of(annotation):
            field = section_here.model_fields[part]
            annotation, takes, about = field.annotation, _takes(field), field.description
        elif isinstance(received, dict) and part in received:
            annotation = _table_values(annotation)
            takes = f"{_type_words(annotation)} ({about})"
        else:
            break
        received = received[part]
        keys.append(part)
    key = ".".join(keys) or "experiment"
    if _is_type_error(kind):
        return key, f"`{key}` takes {takes}. Received: {received!r}."
    message = error["msg"].removeprefix("Value error, ").replace("Input should", "must")
    if _section_of(annotation):  # a rule between several keys, which names them
        return key, f"`{key}`: {message}."
    each = "each " if isinstance(received, list) and kind != "value_error" else ""
    return key, f"`{key}`: {each}{message}. It takes {takes}. Received: {received!r}."


def _table_values(annotation: Any) -> Any:
    """What the values of a `dict[str, ...]`, or of one that may be left out, are."""
    if typing.get_origin(annotation) is dict:
        return typing.get_args(annotation)[1]
    return _table_values(typing.get_args(annotation)[0])


def _section_of(annotation: Any) -> type[Section] | None:
    for part in (annotation, *typing.get_args(annotation)):
        if isinstance(part, type) and issubclass(part, Section):
            return part
    return None


def _takes(field: Any) -> str:
    text = _type_words(field.annotation, field.metadata)
    return f"{text} ({field.description})" if field.description else text


_WORDS: dict[Any, tuple[str, str]] = {
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    str: ("a text", "texts"),
    bool: ("true or false", "true or false"),
    Value: ("a text, a number, true or false", "texts, numbers, true or false"),
}


def _type_words(annotation: Any, metadata: Any = (), *, plural: bool = False) -> str:
    """What an annotation takes, for people: "5 whole numbers" for a list whose length is set to 5."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation in _WORDS:
        return _WORDS[annotation][plural]
    if origin is typing.Annotated:
        return _type_words(args[0], args[1].metadata, plural=plural)
    if origin is Literal:
        return " or ".join(json.dumps(a) for a in args)
    if origin in (Union, types.UnionType):
        return " or ".join(_type_words(a, metadata) for a in args if a is not type(None))
    if origin in (list, Sequence):
        items = _type_words(args[0], plural=True)
        least = [m.min_length for m in metadata if hasattr(m, "min_length")]
        most = [m.max_length for m in metadata if hasattr(m, "max_length")]
        if least and least == most:
            return f"{least[0]} {items}"
        return f"{'lists' if plural else 'a list'} of {items}"
    if origin in (dict, Mapping):
        return f"a table of {_type_words(args[1], plural=True)}"
    return f"a section with the keys {', '.join(annotation.model_fields)}"


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
