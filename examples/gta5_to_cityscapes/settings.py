"""All settings of a run: defaults, then a preset, then flags; later ones win.

Each group is defined beside the code that reads it. `tyro` derives the command line and its help
from their types and docstrings. A preset is a TOML file of flags without their dashes; a run saves
its settings as `settings.toml`, which is a preset itself.
"""

import contextlib
import dataclasses
import difflib
import json
import sys
import tomllib
from dataclasses import field
from pathlib import Path
from typing import NoReturn

import parallel
import torch
import tyro
from data import DataSettings
from engine.files import write_text
from engine.loop import TrainingSettings
from engine.run import RunSettings
from limits import check_limits
from method import StageSettings
from networks.build import NetworkSettings
from warm_up import WarmUpSettings

PRESETS = Path(__file__).with_name("presets")
_TYRO = (tyro.conf.OmitArgPrefixes,)
_TITLE = "Anchor-guided domain adaptation (CAG-UDA), from GTA5 or SYNTHIA to Cityscapes."
_EXAMPLES = """examples:
  python train.py                                                    a synthetic pair, minutes
  python train.py --source GTA5 --target CITYSCAPES --output runs/first
  python train.py --preset gta5 --source GTA5 --target CITYSCAPES \\
      --backbone resnet101.pth --output runs/gta5                    the paper's experiment
  python train.py --preset mine.toml --resume                        settings of a file of yours
"""
# Settings that may differ when a run is resumed.
_OF_MACHINE = {"output", "resume", "workers", "threads", "device", "compile", "checkpoint_every"}
# Data are compared by their content.
_OF_MACHINE |= {"source", "target", "classes", "skip_bad"}

Groups = tuple[
    RunSettings, DataSettings, NetworkSettings, WarmUpSettings, StageSettings, TrainingSettings
]


@dataclasses.dataclass(frozen=True)
class Settings:
    """All settings, in groups."""

    run: RunSettings = field(default_factory=RunSettings)
    data: DataSettings = field(default_factory=DataSettings)
    network: NetworkSettings = field(default_factory=NetworkSettings)
    warm_up: WarmUpSettings = field(default_factory=WarmUpSettings)
    stages: StageSettings = field(default_factory=StageSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)

    def groups(self) -> Groups:
        """Return the groups, in their order."""
        return self.run, self.data, self.network, self.warm_up, self.stages, self.training

    def plain(self) -> dict[str, object]:
        """Return strings, numbers and lists by name, without those that are not set."""
        values = {
            entry.name: getattr(group, entry.name)
            for group in self.groups()
            for entry in dataclasses.fields(group)
        }
        return {name: _plain(value) for name, value in values.items() if value is not None}

    def save(self, path: Path) -> None:
        """Write a preset of these settings."""
        lines = (
            f"{_flag(name)} = {json.dumps(value, ensure_ascii=False)}\n"
            for name, value in self.plain().items()
        )
        write_text(path, "".join(lines))


def _flag(name: str) -> str:
    return name.replace("_", "-")


def _plain(value: object) -> object:
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value


@dataclasses.dataclass(frozen=True)
class _CommandLine(Settings):
    preset: str | None = None
    """A preset: gta5 or synthia for the paper's settings; self-training for stages without anchors;
    or a TOML file. Flags override it."""


def parse_settings(arguments: list[str] | None = None) -> Settings:
    """Return settings from the command line; exit with a message where they are wrong."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        line = _parse(arguments)
        if line.preset is not None:
            line = _parse([*_preset_arguments(_preset_path(line.preset)), *arguments])
        settings = _checked(line)
        return _resumed(settings) if settings.run.resume else _fresh(settings)
    except ValueError as error:
        _exit(str(error))


def _parse(arguments: list[str]) -> _CommandLine:
    try:
        return tyro.cli(
            _CommandLine, prog="train.py", description=_TITLE, args=arguments, config=_TYRO
        )
    except SystemExit as stopped:
        if not stopped.code:
            print(_EXAMPLES, end="")
        raise


def _exit(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def _preset_path(name: str) -> Path:
    names = sorted(path.stem for path in PRESETS.glob("*.toml"))
    path = PRESETS / f"{name}.toml" if name in names else Path(name)
    if not path.is_file():
        raise ValueError(
            f"there is no preset {name!r}: expected {', '.join(names)}, or a TOML file"
        )
    return path


def _preset_arguments(path: Path) -> list[str]:
    """Return a preset as flags of the command line, each of them valid by itself."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a TOML file: {error}") from error
    flags = [
        _flag(entry.name) for group in Settings().groups() for entry in dataclasses.fields(group)
    ]
    arguments = {}
    for key, value in content.items():
        if key not in flags:
            close = difflib.get_close_matches(key, flags, n=1)
            fix = f" Did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"{path}: there is no setting {key!r}.{fix}")
        if isinstance(value, bool):
            arguments[key] = [f"--{key}" if value else f"--no-{key}"]
        elif isinstance(value, list):
            arguments[key] = [f"--{key}", *map(str, value)]
        else:
            arguments[key] = [f"--{key}={value}"]
    together = [argument for of_one in arguments.values() for argument in of_one]
    if not _parses(together):
        wrong = next(key for key, of_one in arguments.items() if not _parses(of_one))
        with contextlib.suppress(SystemExit):
            _parse(arguments[wrong])  # prints what --key expects
        raise ValueError(f"{path}: {wrong} cannot be {content[wrong]!r}")
    return together


def _parses(arguments: list[str]) -> bool:
    try:
        tyro.cli(_CommandLine, args=arguments, config=_TYRO, console_outputs=False)
    except SystemExit:
        return False
    return True


def _checked(line: Settings) -> Settings:
    """Return the settings with a device, if they fit together."""
    settings = Settings(*line.groups())
    if not settings.run.device:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        settings = dataclasses.replace(
            settings, run=dataclasses.replace(settings.run, device=device)
        )
    for group in settings.groups():
        check_limits(group)
    run, data, network, warm_up, stages, _ = settings.groups()
    for group in (run, data, network, warm_up, stages):
        group.check()
    batches = {
        "--warmup-batch": settings.warm_up.warmup_batch,
        "--stage-batch": settings.stages.stage_batch,
    }
    processes, parts = parallel.started(), settings.training.accumulate
    for flag, batch in batches.items():
        if batch % (processes * parts):
            each = f" for each of {processes} processes" if processes > 1 else ""
            raise ValueError(
                f"{flag} {batch} cannot be split into --accumulate {parts} equal parts{each}"
            )
    is_gpu = torch.device(settings.run.device).type == "cuda"
    if settings.network.batch_norm == "sync" and not is_gpu:
        raise ValueError("--batch-norm sync works on GPUs alone: choose train or freeze")
    return settings


def _fresh(settings: Settings) -> Settings:
    output = settings.run.output
    metrics = output / "metrics.jsonl"
    if metrics.exists() and metrics.stat().st_size:
        raise ValueError(
            f"{output} already holds a run: go on with it by --resume, remove it, or name another "
            "--output"
        )
    return settings


def _resumed(settings: Settings) -> Settings:
    """Return the same settings, if an earlier run in the folder had them."""
    output = settings.run.output
    saved = output / "settings.toml"
    if not saved.is_file():
        return settings  # stopped before it began
    before, now = _parse(_preset_arguments(saved)).plain(), settings.plain()
    for name in sorted((before.keys() | now.keys()) - _OF_MACHINE):
        if before.get(name) != now.get(name):
            raise ValueError(
                f"{output} holds a run with --{_flag(name)} {before.get(name)}, but now it is "
                f"{now.get(name)}: go on with --preset {saved}, or name another --output"
            )
    return settings
