"""The configuration: frozen, typed, strict; read from a YAML file and `--set key.path=value` overrides.

Every problem is reported at once, one line each, with the file, the key, what was given and what is allowed.
Nothing here imports TensorFlow, so a wrong key is answered in a fraction of a second.
"""

import difflib
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import yaml
from pydantic import BaseModel, BeforeValidator, Field

from trainer.errors import ConfigError

MIN_IMAGE_SIDE = 32
IMAGE_SIDE_MULTIPLE = 16
MAX_IMAGE_SIDE = 4096
SAMPLE_CONFIG = Path(__file__).parent / "sample" / "sample.yaml"

CHANGEABLE = "may change when a run goes on"


def _list_to_tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _no_float16(precision: object) -> object:
    if precision in ("float16", "mixed_float16"):
        raise ValueError(
            "float32 or mixed_bfloat16; float16 would need loss scaling, whose skipped steps hide a run that diverges, "
            "while bfloat16 has float32's range and needs none"
        )
    return precision


def _image_side(side: int) -> int:
    if side % IMAGE_SIDE_MULTIPLE:
        lower = max(MIN_IMAGE_SIDE, side - side % IMAGE_SIDE_MULTIPLE)
        upper = side - side % IMAGE_SIDE_MULTIPLE + IMAGE_SIDE_MULTIPLE
        raise ValueError(f"a multiple of {IMAGE_SIDE_MULTIPLE}, such as {lower} or {upper}")
    return side


ImageSide = Annotated[int, Field(ge=MIN_IMAGE_SIDE, le=MAX_IMAGE_SIDE), pydantic.AfterValidator(_image_side)]
Filters = Annotated[int, Field(ge=1, le=512)]
Interval = Annotated[int, Field(ge=0)]


def _setting(default: Any, description: str, *, changeable: bool = False) -> Any:
    extra: dict[str, pydantic.JsonValue] | None = {CHANGEABLE: True} if changeable else None
    return Field(default=default, description=description, json_schema_extra=extra)


class Section(BaseModel):
    """A group of settings: unknown keys, wrong types and changes after construction are refused."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class DataConfig(Section):
    """Which pairs are read and how they are augmented."""

    dir: str = _setting("", "folder with dataset.json and its shards; empty: the packaged sample", changeable=True)
    direction: Literal["forward", "reverse"] = _setting("forward", "forward: input to target; reverse: swapped")
    image_size: Annotated[tuple[ImageSide, ImageSide], BeforeValidator(_list_to_tuple)] = _setting(
        (256, 256), "height and width in pixels that the networks see"
    )
    jitter: Annotated[int, Field(ge=0, le=1024)] = _setting(
        30, "pixels added by the resize before the random crop, as 256 to 286 in the paper"
    )
    mirror: bool = _setting(True, "mirror half of the training pairs left to right")
    cache: Literal["auto", "none", "memory", "disk"] = _setting(
        "auto",
        "keep the encoded records after the first read, in memory or (of a bucket) in TMPDIR; auto: of a bucket, where they fit",
        changeable=True,
    )
    readers: Annotated[int, Field(ge=1, le=64)] = _setting(16, "requests to a bucket at the same time", changeable=True)
    read_ahead_mb: Annotated[int, Field(ge=1)] = _setting(
        1024, "megabytes of records that are read from a bucket before they are needed, where none are kept", changeable=True
    )


class GeneratorConfig(Section):
    """The network that draws the target."""

    kind: Literal["unet"] = _setting("unet", "encoder and decoder joined by skips")
    filters: Filters = _setting(64, "channels of the first level; deeper levels have up to 8 times as many")


class DiscriminatorConfig(Section):
    """The network that judges patches of a pair."""

    kind: Literal["patch"] = _setting("patch", "PatchGAN: one logit for each overlapping patch")
    receptive_field: Literal[1, 16, 34, 70, 142, 286] = _setting(70, "side of the patch that one logit sees, in pixels")
    filters: Filters = _setting(64, "channels of the first layer; deeper layers have up to 8 times as many")


class ModelConfig(Section):
    """Both networks."""

    generator: GeneratorConfig = GeneratorConfig()
    discriminator: DiscriminatorConfig = DiscriminatorConfig()
    norm: Literal["batch", "sync_batch", "instance", "none"] = _setting(
        "batch", "normalisation in both networks; batch: over a device's part of the batch, sync_batch: over all of it"
    )
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = _setting(0.5, "rate in the first three decoder levels")
    inference: Literal["paper", "frozen"] = _setting(
        "paper", "paper: dropout on, statistics of each image alone; frozen: dropout off, moving statistics"
    )
    precision: Annotated[Literal["float32", "mixed_bfloat16"], BeforeValidator(_no_float16)] = _setting(
        "float32", "mixed_bfloat16: convolutions in bfloat16; weights, statistics and losses in float32"
    )


class LossConfig(Section):
    """The objective."""

    gan: Literal["non_saturating"] = _setting("non_saturating", "sigmoid cross entropy, the generator's labels flipped")
    reconstruction: Literal["l1"] = _setting("l1", "mean absolute difference between output and target")
    reconstruction_weight: Annotated[float, Field(ge=0.0)] = _setting(100.0, "lambda, the weight of the L1 term")
    discriminator_weight: Annotated[float, Field(gt=0.0)] = _setting(0.5, "factor on the discriminator's loss")


class OptimizerConfig(Section):
    """Adam, the same for both networks."""

    learning_rate: Annotated[float, Field(gt=0.0)] = _setting(2.0e-4, "step size of Adam")
    beta_1: Annotated[float, Field(ge=0.0, lt=1.0)] = _setting(0.5, "decay of the first moment")
    beta_2: Annotated[float, Field(ge=0.0, lt=1.0)] = _setting(0.999, "decay of the second moment")
    schedule: Literal["constant", "linear_decay"] = _setting(
        "constant", "linear_decay: constant for the first half of the steps, then down to 0"
    )
    clip_norm: Annotated[float, Field(ge=0.0)] = _setting(
        0.0, "largest norm of a network's gradient, the sum over all devices; 0: not clipped"
    )


class TrainConfig(Section):
    """How long, and what happens on the way; an interval of 0 means never."""

    batch_size: Annotated[int, Field(ge=1)] = _setting(1, "pairs in one step over all devices together")
    microbatches: Annotated[int, Field(ge=1)] = _setting(
        1,
        "parts of a device's batch worked on one after the other, to save memory; the update is that of the whole",
        changeable=True,
    )
    ema_decay: Annotated[float, Field(ge=0.0, lt=1.0)] = _setting(
        0.0, "keep a moving average of the generator's weights, and draw with it; such as 0.999; 0: none"
    )
    steps: Annotated[int, Field(ge=1)] = _setting(80000, "steps of both networks in the whole run", changeable=True)
    steps_per_loop: Literal["auto"] | Annotated[int, Field(ge=1)] = _setting(
        "auto", "steps between two looks of the host; auto: about 2 seconds", changeable=True
    )
    checkpoint_every: Interval = _setting(1000, "steps between checkpoints", changeable=True)
    summary_every: Interval = _setting(100, "steps between scalars for TensorBoard", changeable=True)
    sample_every: Interval = _setting(1000, "steps between sample pictures", changeable=True)
    evaluate_every: Interval = _setting(5000, "steps between evaluations on val", changeable=True)
    keep: Annotated[int, Field(ge=1)] = _setting(3, "newest checkpoints kept, besides the best", changeable=True)


class RuntimeConfig(Section):
    """The machine: nothing here changes what is computed, but for rounding."""

    threads: Annotated[int, Field(ge=0, le=1024)] = _setting(
        0, "CPU threads inside an operation; 0: one for each core (the bits depend on it)", changeable=True
    )
    cpu_devices: Annotated[int, Field(ge=1, le=64)] = _setting(
        1, "split the CPU into so many devices, to try --strategy=mirrored on a laptop", changeable=True
    )
    jit: bool = _setting(False, "compile both networks' forward and backward passes with XLA", changeable=True)
    tf32: bool = _setting(True, "let NVIDIA GPUs round float32 products to TF32's 10 bits: faster", changeable=True)
    deterministic: bool = _setting(
        False, "GPU kernels that give the same bits every time: slower (on CPU they always do)", changeable=True
    )
    memory_growth: bool = _setting(True, "take GPU memory as it is needed, not all at once", changeable=True)
    rendezvous_seconds: Annotated[int, Field(ge=1)] = _setting(
        900, "how long the workers wait for each other at the start", changeable=True
    )
    bucket_patience_seconds: Annotated[int, Field(ge=1)] = _setting(
        300, "how long a bucket that does not answer is tried before the process ends with 75", changeable=True
    )
    peer_timeout_seconds: Annotated[int, Field(ge=5)] = _setting(
        600, "without a step for so long, a worker takes its peers for lost; longer than a compile and a save", changeable=True
    )


class Config(Section):
    """Everything that, with the data, determines a run."""

    seed: Annotated[int, Field(ge=0, lt=2**31)] = _setting(0, "of weights, data order, augmentation and dropout")
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    runtime: RuntimeConfig = RuntimeConfig()

    @pydantic.model_validator(mode="after")
    def _patch_fits_image(self) -> "Config":
        needed = minimum_side(self.model.discriminator.receptive_field)
        if min(self.data.image_size) < needed:
            raise ValueError(
                f"data.image_size: got {list(self.data.image_size)}, allowed: sides of {needed} or more for a "
                f"receptive field of {self.model.discriminator.receptive_field}"
            )
        return self

    @pydantic.model_validator(mode="after")
    def _microbatches_fit_norm(self) -> "Config":
        if self.train.microbatches > 1 and self.model.norm == "sync_batch":
            raise ValueError(
                f"train.microbatches: got {self.train.microbatches}, allowed: 1 with model.norm=sync_batch, which needs the "
                "whole batch at once; instance and none are the same in parts, batch normalises over each part"
            )
        return self


def strided_layers(receptive_field: int) -> int:
    """Stride-2 convolutions of the PatchGAN with this receptive field: 1 -> 0, 16 -> 1, 34 -> 2, 70 -> 3, ..."""
    return {1: 0, 16: 1, 34: 2, 70: 3, 142: 4, 286: 5}[receptive_field]


def minimum_side(receptive_field: int) -> int:
    """Smallest image side, in pixels, that leaves the PatchGAN at least one logit after its two unstrided layers."""
    return 1 if receptive_field == 1 else 3 * 2 ** strided_layers(receptive_field)


class _Loader(yaml.SafeLoader):
    """YAML that refuses a key given twice and reads 2e-4 as the number it looks like."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _mapping_without_repeats(loader: _Loader, node: yaml.MappingNode) -> dict[object, object]:
    seen: set[object] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node)
        if not isinstance(key, str | int | float | bool | None):
            raise yaml.constructor.ConstructorError(None, None, "a key must be a plain word", key_node.start_mark)
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} stands twice", key_node.start_mark)
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping_without_repeats)


def parse_yaml(text: str, where: str) -> object:
    """Parse YAML text; `where` names it in the one line of the ConfigError raised for broken YAML."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{where}, line {mark.line + 1}" if mark else where
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError([f"{place}: broken YAML: {problem}"]) from error


def _read_file(path: str) -> dict[str, Any]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError([f"{path}: no such config file{_similar_files(path)}"]) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"{path}: cannot read the config file: {_reason(error)}"]) from error
    return _tree_of(text, path)


def _tree_of(text: str, path: str) -> dict[str, Any]:
    tree = parse_yaml(text, path)
    if tree is not None and not isinstance(tree, dict):
        raise ConfigError([f"{path}: got {_shown(tree)}, allowed: a mapping of keys such as `seed: 0`"])
    return tree or {}


def _reason(error: OSError | UnicodeDecodeError) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else "it is not UTF-8 text"


def _similar_files(path: str) -> str:
    folder = Path(path).parent
    names = [p.name for p in folder.glob("*.y*ml")] if folder.is_dir() else []
    near = difflib.get_close_matches(Path(path).name, names, n=1, cutoff=0.75)
    return f"; did you mean {folder / near[0]}?" if near else ""


def _apply_override(tree: dict[str, Any], override: str) -> str | None:
    """Put one `key.path=value` into the tree; return the problem, or None."""
    path, equals, text = override.partition("=")
    if not equals or not path:
        return f"--set {override}: allowed: key.path=value, such as train.steps=1000"
    try:
        value = parse_yaml(text, f"--set {override}")
    except ConfigError as error:
        return str(error)
    *sections, last = path.split(".")
    for section in sections:
        if tree.get(section) is None:
            tree[section] = {}
        tree = tree[section]
        if not isinstance(tree, dict):
            return f"--set {override}: {section} is a setting, not a section"
    tree[last] = value
    return None


def _shown(value: object) -> str:
    text = repr(list(value)) if isinstance(value, tuple) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


_ALLOWED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "tuple_type": "a list such as [256, 256]",
    "model_type": "a section with keys of its own",
    "model_attributes_type": "a section with keys of its own",
    "finite_number": "a finite number",
    "greater_than": "a number above {gt}",
    "greater_than_equal": "{ge} or more",
    "less_than": "a number below {lt}",
    "less_than_equal": "{le} or less",
    "literal_error": "{expected}",
    "too_short": "{min_length} values",
    "too_long": "{max_length} values",
}


def _allowed(error: Mapping[str, Any]) -> str:
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    if error["type"] == "missing":
        return "a list of two numbers such as [256, 256]"
    return str(_ALLOWED.get(error["type"], error["msg"])).format(**error.get("ctx", {}))


def _key(location: Sequence[int | str]) -> str:
    parts = [part for part in location if not str(part).startswith(("literal[", "constrained-", "function-"))]
    parts = [part for part in parts if part != "int"]
    return ".".join(f"[{part}]" if isinstance(part, int) else part for part in parts).replace(".[", "[")


def _unknown_key(key: str) -> str:
    known = [name for name, _ in leaves(Config())] + list(Config.model_fields)
    tails = {name: name.rsplit(".", 1)[-1] for name in known}
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.75)
    if not near:
        tail = difflib.get_close_matches(key.rsplit(".", 1)[-1], list(tails.values()), n=1, cutoff=0.7)
        near = [name for name in known if tail and tails[name] == tail[0]]
    return f"; did you mean {near[0]}?" if near else "; `trainer --help` lists the keys"


def _origin(key: str, path: str | None, overrides: Sequence[str]) -> str:
    """Say where the value of a key came from: the last override that sets it, the file, or the defaults."""
    for override in reversed(overrides):
        name = override.partition("=")[0]
        if key == name or key.startswith((name + ".", name + "[")) or name.startswith(key + "."):
            return f"--set {override}"
    return path or "defaults"


def _problems(error: pydantic.ValidationError, path: str | None, overrides: Sequence[str]) -> list[str]:
    lines: dict[str, list[str]] = {}
    unknown: list[str] = []
    for item in error.errors():
        key = _key(item["loc"])
        if item["type"] == "extra_forbidden":
            unknown.append(f"{_origin(key, path, overrides)}: unknown key {key}{_unknown_key(key)}")
        elif not key:
            unknown.append(f"{path or 'defaults'}: {item['ctx']['error']}")
        else:
            given = f"{_origin(key, path, overrides)}: {key}: got {_shown(item['input'])}, allowed: "
            lines.setdefault(given, []).append(_allowed(item))
    return unknown + [given + " or ".join(dict.fromkeys(allowed)) for given, allowed in lines.items()]


def load_config(path: str | None = None, overrides: Sequence[str] = (), text: str | None = None) -> Config:
    """Read the YAML file at `path` (None: the defaults alone) and apply `key.path=value` overrides, last one wins.

    With `text`, the file has been read already, and `path` only names it.

    Raises:
        ConfigError: with one line for each problem found.
    """
    tree = {} if path is None else _read_file(path) if text is None else _tree_of(text, path)
    bad = [problem for override in overrides if (problem := _apply_override(tree, override))]
    try:
        config = Config.model_validate(tree)
    except pydantic.ValidationError as error:
        raise ConfigError(bad + _problems(error, path, overrides)) from error
    if bad:
        raise ConfigError(bad)
    return config


def validation_lines(error: pydantic.ValidationError, where: str) -> list[str]:
    """One line for each wrong or missing entry of a JSON or YAML document named by `where`."""
    return [f"{where}: {_validation_line(item)}" for item in error.errors()]


def _validation_line(item: Mapping[str, Any]) -> str:
    key = _key(item["loc"])
    plain = {
        "extra_forbidden": f"{key}: unknown key",
        "missing": f"{key}: missing",
        "json_invalid": f"not JSON: {item['msg']}",
    }
    return plain.get(item["type"]) or f"{key}: got {_shown(item['input'])}, allowed: {_allowed(item)}"


def config_from_tree(tree: object, where: str) -> Config:
    """Validate an already parsed mapping, as a run's config.yaml holds it; `where` names it in errors."""
    try:
        return Config.model_validate(tree)
    except pydantic.ValidationError as error:
        raise ConfigError(validation_lines(error, where)) from error


def to_tree(config: Config) -> dict[str, Any]:
    """The config as plain mappings, lists and scalars, ready for YAML."""
    return config.model_dump(mode="json")


def leaves(section: BaseModel, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) for every setting, in the order of the schema."""
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def field_info(key: str) -> pydantic.fields.FieldInfo:
    """The schema's entry for a dotted key: its description and whether it may change when a run goes on."""
    *sections, last = key.split(".")
    model: type[BaseModel] = Config
    for section in sections:
        model = typing.cast(type[BaseModel], model.model_fields[section].annotation)
    return model.model_fields[last]


def differences(old: Config, new: Config) -> list[str]:
    """Lines for the settings that differ and may not change while a run goes on (law: a run is one function)."""
    before = dict(leaves(old))
    return [
        f"{key}: {_shown(before[key])} in the run, {_shown(value)} now"
        for key, value in leaves(new)
        if before[key] != value and not (field_info(key).json_schema_extra or {})
    ]
