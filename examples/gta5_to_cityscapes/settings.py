"""All that a run depends on: defaults here, presets as files, flags on top.

A preset is a TOML file of flags without their dashes in front; a run saves its own as
`settings.toml`, which is a preset itself. Later ones win: defaults, preset, flags.
"""

import argparse
import dataclasses
import difflib
import json
import math
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from types import NoneType
from typing import Annotated, Literal, NamedTuple, get_args, get_origin, get_type_hints

sys.path.insert(0, str(Path(__file__).parents[1] / "synthetic"))

import parallel
import torch
from build import NETWORKS
from records import write_text
from synthetic import SourceFormat

PRESETS = Path(__file__).with_name("presets")


class Range(NamedTuple):
    """What a number may be."""

    low: float
    high: float = math.inf

    def __str__(self) -> str:
        """What an error says of it."""
        return f"in [0, {self.high}]" if self.high < math.inf else f"of at least {self.low}"


AT_LEAST_0, AT_LEAST_1, FRACTION = Range(0), Range(1), Range(0, 1)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything that can be set, by groups; the defaults suit a CPU and small images."""

    output: Annotated[Path, "folder for metrics, checkpoints and report"] = Path("runs/run")

    # Data.
    source: Annotated[Path | None, "GTA5 or SYNTHIA folder; none: a synthetic pair"] = None
    target: Annotated[Path | None, "Cityscapes folder (leftImg8bit, gtFine)"] = None
    source_format: Annotated[
        SourceFormat,
        "gta5: images, labels; synthia: RGB, GT/LABELS, and its 16 classes in evaluation",
    ] = "gta5"
    resize: Annotated[str, "what images are scaled to: height:PIXELS or width:PIXELS"] = (
        "height:144"
    )
    crop: Annotated[tuple[int, int], "height and width of the crops to train on"] = (128, 192)
    photometric: Annotated[bool, "change color, light and sharpness of the crops at random"] = True
    class_weights: Annotated[bool, "weigh rare classes up in the source's cross-entropy"] = True

    # Network.
    network: Annotated[str, "small is for a CPU, deeplab101 the paper's"] = "small"
    weights: Annotated[
        str | None,
        "start from these weights of a whole network: a file, as of the released code; for "
        "SegFormer a folder or a hub id",
    ] = None
    backbone: Annotated[
        str | None,
        "start from these ImageNet weights: a file of a ResNet as torchvision's; for "
        "SegFormer a folder or a hub id",
    ] = None
    batch_norm: Annotated[
        Literal["train", "freeze", "sync"],
        "freeze: statistics, scale and shift stay; sync: statistics over all GPUs",
    ] = "train"

    # Warm-up.
    warmup: Annotated[
        Literal["source", "adversarial"],
        "source alone, or aligning the target's predictions with it (AdaptSegNet)",
    ] = "source"
    warmup_checkpoint: Annotated[Path | None, "start from this warm-up, not from training one"] = (
        None
    )
    warmup_iterations: Annotated[int, "of the warm-up, and the baseline", AT_LEAST_0] = 900
    warmup_batch: Annotated[int, "images of each domain that a warm-up step sees", AT_LEAST_1] = 4
    warmup_learning_rate: Annotated[float, "at the start of the warm-up", AT_LEAST_0] = 0.003
    adversarial_weight: Annotated[float, "of the term that fools the discriminator", AT_LEAST_0] = (
        0.001
    )
    discriminator_learning_rate: Annotated[float, "of the discriminator, by Adam", AT_LEAST_0] = (
        1e-4
    )
    baseline: Annotated[bool, "first train a network on the source as it is, to compare"] = False

    # Stages.
    stages: Annotated[int, "how often the target is labeled anew", AT_LEAST_0] = 3
    stage_iterations: Annotated[int, "of each stage", AT_LEAST_1] = 280
    stage_batch: Annotated[int, "images of each domain that a step of a stage sees", AT_LEAST_1] = 2
    stage_learning_rate: Annotated[float, "at the start of each stage", AT_LEAST_0] = 0.001
    objective: Annotated[
        Literal["paper", "released"],
        "released: as the released code computes it (anchorda.released)",
    ] = "paper"
    labels: Annotated[
        Literal["anchor", "probability", "both"], "what labels target pixels; both is the paper's"
    ] = "both"
    margin: Annotated[
        str,
        "minimum margin of anchor labels: a number; coverage:Q, by class, on the target; "
        "precision:P, by class, on the held-out source; or several of these, the highest counts",
    ] = "coverage:0.2,precision:0.5"
    probability: Annotated[float, "minimum of probability labels", FRACTION] = 0.95
    distance_weight: Annotated[float, "weight of the distance loss", AT_LEAST_0] = 0.02
    teacher: Annotated[
        float,
        "decay of a moving average of the weights, which then is what a phase ends with and "
        "what labels for the next; 0: none",
        FRACTION,
    ] = 0.0

    # Optimization.
    optimizer: Annotated[Literal["adamw", "sgd"], "sgd has a momentum of 0.9"] = "adamw"
    weight_decay: Annotated[float, "of the optimizer", AT_LEAST_0] = 0.01
    rise: Annotated[float, "part of a phase in which the learning rate rises", FRACTION] = 0.05
    accumulate: Annotated[int, "parts of a batch, computed one after the other", AT_LEAST_1] = 1
    precision: Annotated[Literal["float32", "bfloat16", "float16"], "of the network"] = "float32"
    max_iterations: Annotated[int, "no phase takes more; 0: no limit", AT_LEAST_0] = 0

    # Long runs.
    resume: Annotated[bool, "go on with what an interrupted run left in --output, if any"] = False
    checkpoint_every: Annotated[
        int, "iterations between checkpoints to resume from", AT_LEAST_1
    ] = 200
    evaluate_every: Annotated[
        int,
        "iterations between evaluations, of which the best is kept; 0: the last alone",
        AT_LEAST_0,
    ] = 0
    best_by: Annotated[
        Literal["source", "target"],
        "mIoU that tells the best network: of held-out source images; or of the target's "
        "validation split, as in the released code, whose labels have then been used to choose",
    ] = "source"

    # Machine.
    seed: Annotated[int, "of all randomness", AT_LEAST_0] = 0
    workers: Annotated[
        int, "processes that read images of each domain, for each that trains", AT_LEAST_0
    ] = 2
    threads: Annotated[int, "of torch on the CPU; 0 leaves it to torch", AT_LEAST_0] = 0
    device: Annotated[str, "of torch; none: a GPU if there is one"] = ""
    compile: Annotated[bool, "compile the network with torch.compile"] = False

    def iterations(self, of_phase: int) -> int:
        """The length of a phase under `max_iterations`."""
        return min(of_phase, self.max_iterations or of_phase)

    def plain(self) -> dict[str, object]:
        """Strings, numbers and lists alone, without what is not set."""
        values = {
            name: str(v) if isinstance(v, Path) else v
            for name, v in dataclasses.asdict(self).items()
        }
        return {
            name: list(v) if isinstance(v, tuple) else v
            for name, v in values.items()
            if v is not None
        }

    def save(self, path: Path) -> None:
        """Write a preset of all of this."""
        lines = (
            f"{_flag(k)} = {json.dumps(v, ensure_ascii=False)}" for k, v in self.plain().items()
        )
        write_text(path, "\n".join(lines) + "\n")


# What may differ when a run goes on: where and how fast it is computed.
_MACHINE = {"output", "resume", "workers", "threads", "device", "compile", "checkpoint_every"}
_TYPES = get_type_hints(Settings)
_NOTES = {
    name: hint.__metadata__ for name, hint in get_type_hints(Settings, include_extras=True).items()
}


_SPOKEN: dict[object, str] = {
    **{int: "a whole number", float: "a number", bool: "true or false"},
    **{str: "a string", Path: "a string"},
}


def parse_settings(arguments: list[str] | None = None) -> Settings:
    """Settings from the command line, or an exit that says what is wrong with it."""
    parser = _parser()
    given = vars(parser.parse_args(arguments))
    preset = given.pop("preset", None)
    try:
        values = _read(_preset_path(preset)) if preset else {}
        settings = _checked(values | given)
        return _continued(settings) if settings.resume else _fresh(settings)
    except ValueError as error:
        parser.error(str(error))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Category anchor-guided domain adaptation, GTA5 or SYNTHIA to Cityscapes.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--preset", help=f"{', '.join(_preset_names())}, or a TOML file of settings"
    )
    for name, default in dataclasses.asdict(Settings()).items():
        flag, kind, text = "--" + _flag(name), _without_none(_TYPES[name]), _NOTES[name][0]
        if default not in (None, ""):
            shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
            text = f"{text} (default: {shown})"
        text = text.replace("%", "%%")
        if kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
        elif kind == tuple[int, int]:
            parser.add_argument(flag, type=int, nargs=2, metavar=("H", "W"), help=text)
        else:
            choices = get_args(kind) if get_origin(kind) is Literal else None
            convert = kind if kind in (int, float, Path) else str
            parser.add_argument(flag, type=convert, choices=choices, help=text)
    return parser


def _preset_names() -> list[str]:
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


def _preset_path(name: str) -> Path:
    path = PRESETS / f"{name}.toml" if name in _preset_names() else Path(name)
    if not path.is_file():
        names = ", ".join(_preset_names())
        raise ValueError(f"there is no preset {name!r}: expected {names}, or a TOML file")
    return path


def _read(path: Path) -> dict[str, object]:
    """The values of a preset, of the right names and types."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a TOML file: {error}") from error
    flags = {_flag(name): name for name in _TYPES}
    values = {}
    for key, value in content.items():
        if key not in flags:
            close = difflib.get_close_matches(key, flags, n=1)
            mend = f" Did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"{path}: there is no setting {key!r}.{mend}")
        try:
            values[flags[key]] = _converted(_TYPES[flags[key]], value)
        except TypeError as error:
            raise ValueError(f"{path}: {key} {error}, but got {value!r}") from error
    return values


def _converted(kind: object, value: object) -> object:
    kind = _without_none(kind)
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise TypeError(f"is one of {', '.join(get_args(kind))}")
    elif kind == tuple[int, int]:
        if not (isinstance(value, list) and len(value) == 2 and all(type(v) is int for v in value)):
            raise TypeError("is two whole numbers")
        return (value[0], value[1])
    elif kind is Path and isinstance(value, str):
        return Path(value)
    elif kind is float and type(value) is int:
        return float(value)
    elif not isinstance(kind, type) or type(value) is not kind:
        raise TypeError(f"is {_SPOKEN.get(kind, kind)}")
    return value


def _without_none(kind: object) -> object:
    kinds = [part for part in get_args(kind) if part is not NoneType]
    return kinds[0] if NoneType in get_args(kind) else kind


def _flag(name: str) -> str:
    return name.replace("_", "-")


def _checked(values: Mapping[str, object]) -> Settings:
    """Settings that fit together, or a ValueError that names what does not."""
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    settings = dataclasses.replace(Settings(), **values)  # type: ignore[arg-type]
    if not settings.device:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        settings = dataclasses.replace(settings, device=device)
    for name, (_, *ranges) in _NOTES.items():
        got = getattr(settings, name)
        if ranges and not ranges[0].low <= got <= ranges[0].high:
            raise ValueError(f"--{_flag(name)}: expected a number {ranges[0]}, got {got}")
    split_resize(settings.resize)
    split_margin(settings.margin)
    if min(settings.crop) < 1:
        raise ValueError(f"--crop: expected two sizes of at least 1, got {settings.crop}")
    if settings.network not in NETWORKS:
        raise ValueError(f"--network: expected one of {', '.join(NETWORKS)}")
    side, pixels = split_resize(settings.resize)
    if settings.crop[side == "width"] > pixels:
        raise ValueError(f"--crop {settings.crop} is larger than --resize {settings.resize}")
    _check_pairs(settings)
    return settings


def _check_pairs(settings: Settings) -> None:
    if (settings.source is None) != (settings.target is None):
        raise ValueError("--source and --target belong together: give both, or neither")
    processes = parallel.started()
    for name in ("warmup_batch", "stage_batch"):
        if getattr(settings, name) % (processes * settings.accumulate):
            each = f" for each of {processes} processes" if processes > 1 else ""
            raise ValueError(
                f"--{_flag(name)} {getattr(settings, name)} cannot be split into --accumulate "
                f"{settings.accumulate} equal parts{each}"
            )
    if settings.network == "small" and (settings.backbone or settings.weights):
        raise ValueError("--backbone and --weights are of other networks: choose a --network")
    if settings.network.startswith("deeplab"):
        for path in filter(None, (settings.backbone, settings.weights)):
            if not Path(path).is_file():
                raise ValueError(f"there is no file of weights {path}")
    if settings.backbone and settings.weights:
        raise ValueError("--weights are of a whole network, its backbone included: give one")
    if settings.warmup_checkpoint is not None and not settings.warmup_checkpoint.is_file():
        raise ValueError(f"there is no warm-up checkpoint {settings.warmup_checkpoint}")
    is_gpu = torch.device(settings.device).type == "cuda"
    if settings.batch_norm == "sync" and not is_gpu:
        raise ValueError("--batch-norm sync works on GPUs alone: choose train or freeze")
    if settings.objective == "released" and settings.labels != "both":
        raise ValueError("--objective released always has --labels both")


def split_resize(text: str) -> tuple[str, int]:
    """The side and the pixels that `--resize` names."""
    side, _, pixels = text.partition(":")
    if side not in ("height", "width") or not pixels.isdecimal() or int(pixels) < 1:
        raise ValueError(f"--resize: expected height:PIXELS or width:PIXELS, got {text!r}")
    return side, int(pixels)


def split_margin(text: str) -> list[tuple[str, float]]:
    """The rules that `--margin` names, each with its number; a fixed margin's rule is empty."""
    rules = []
    for part in text.split(","):
        rule, _, number = part.rpartition(":")
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        known = rule == part.partition(":")[0] and rule in ("coverage", "precision")
        if not (0 <= value <= 1 if known else part == number and not math.isnan(value)):
            raise ValueError(
                "--margin: expected a number, coverage:Q or precision:P with Q, P in [0, 1], "
                f"got {text!r}"
            )
        rules.append((rule, value))
    return rules


def _fresh(settings: Settings) -> Settings:
    if (settings.output / "metrics.jsonl").exists():
        raise ValueError(
            f"{settings.output} already holds a run: go on with it by --resume, remove it, or name "
            "another --output"
        )
    return settings


def _continued(settings: Settings) -> Settings:
    """The same settings, if an earlier run in the folder had them."""
    saved = settings.output / "settings.toml"
    if not saved.is_file():
        return settings  # stopped before it began
    before = _checked(_read(saved))
    for name in _TYPES.keys() - _MACHINE:
        was, now = getattr(before, name), getattr(settings, name)
        if was != now:
            raise ValueError(
                f"{settings.output} holds a run with --{_flag(name)} {was}, but now it is {now}: "
                f"go on with --preset {saved}, or name another --output"
            )
    return settings
