"""The paper's settings: every preset runs whole, and a step of its network on true files."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
import train
from classes import NUM_CLASSES
from data import open_data
from engine.files import load_checkpoint
from engine.run import Run
from networks.build import new_network
from networks.deeplab import DeepLab
from networks.segmenter import Segmenter
from readers import LabeledImages
from scores import select
from settings import Settings, parse_settings
from streams import Loading
from synthetic import SourceFormat, write_synthetic_pair

WHAT = ("labels", "distance")
DATA = Path(__file__).resolve().parents[3] / "shared" / "data"


def events_of(output: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("preset", ["gta5", "synthia"])
def test_a_preset_runs_whole_on_tiny_images(preset: str, tmp_path: Path) -> None:
    source_format: SourceFormat = "synthia" if preset == "synthia" else "gta5"
    source, target = write_synthetic_pair(
        tmp_path / "pair", seed=0, source_images=5, target_images=4, val_images=2, height=64,
        source_format=source_format,
    )  # fmt: skip
    arguments = [
        *("--preset", preset, "--source", str(source), "--target", str(target)),
        *("--output", str(tmp_path / "run"), "--resize", "height:64", "--crop", "64", "96"),
        *("--warmup-batch", "2", "--stage-batch", "1", "--max-iterations", "1"),
        *("--stages", "1", "--margin", "0.01", "--workers", "0", "--device", "cpu"),
    ]
    (tmp_path / "run").mkdir()
    # The presets differ in the source alone; a smaller network does for one of them.
    depth = 18 if preset == "synthia" else 101
    train.adapt([*arguments, "--network", f"deeplab{depth}"])
    saved = (tmp_path / "run" / "settings.toml").read_text()
    for line in (f'network = "deeplab{depth}"', 'warmup = "adversarial"', 'optimizer = "sgd"'):
        assert line in saved
    events = events_of(tmp_path / "run")
    phases = ["warm-up", "stage 1"]
    assert [e["phase"] for e in events if e["kind"] == "evaluation"] == phases
    assert [e["phase"] for e in events if e["kind"] == "selection"] == phases
    terms = [e["terms"] for e in events if e["kind"] == "losses"]
    of_stage = {f"{kind} {what}" for kind in ("anchor", "probability") for what in WHAT}
    assert [set(t) for t in terms if isinstance(t, dict)] == [
        {"source", "adversarial", "discriminator"},
        {"source", "source distance", *of_stage},
    ]
    parts = load_checkpoint(tmp_path / "run" / "checkpoints" / "stage-1.pt")
    DeepLab(NUM_CLASSES, depth).load_state_dict(parts["network"])


def tiny_run(pair: tuple[Path, Path], output: Path, *flags: str) -> Settings:
    """Return a warm-up and a stage of two steps each in this process."""
    output.mkdir()
    arguments = [
        *("--source", str(pair[0]), "--target", str(pair[1]), "--output", str(output)),
        *("--resize", "height:32", "--crop", "32", "48", "--workers", "0", "--device", "cpu"),
        *("--max-iterations", "2", "--stages", "1"),
    ]
    settings = parse_settings([*arguments, *flags])
    train.adapt([*arguments, *flags])
    return settings


def initial(settings: Settings) -> Segmenter:
    return new_network(settings.network, settings.run.seed, torch.device("cpu"))


@pytest.mark.usefixtures("_without_report")
@pytest.mark.parametrize(
    "flags",
    [
        ("--objective", "released", "--distance-weight", "0.7"),
        (
            *("--teacher", "0.9", "--evaluate-every", "1", "--best-by", "target"),
            *("--optimizer", "sgd", "--no-photometric", "--no-class-weights"),
        ),
        ("--precision", "float16", "--warmup", "adversarial", "--accumulate", "2"),
    ],
    ids=lambda flags: " ".join(flags),
)
def test_every_choice_runs(flags: tuple[str, ...], pair: tuple[Path, Path], tmp_path: Path) -> None:
    tiny_run(pair, tmp_path / "run", *flags)
    events = events_of(tmp_path / "run")
    for event in events:
        if event["kind"] == "losses":
            assert isinstance(event["terms"], dict)
            assert all(map(math.isfinite, event["terms"].values()))
    assert [e["phase"] for e in events if e["kind"] == "evaluation"] == ["warm-up", "stage 1"]


@pytest.mark.usefixtures("_without_report")
def test_compiled_networks_trace_and_run(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Traced as ever, but not handed to a C++ compiler, which takes minutes.
    compiled: list[torch.nn.Module] = []

    def compile_eagerly(module: torch.nn.Module) -> None:
        compiled.append(module)
        module._compiled_call_impl = torch.compile(module._call_impl, backend="eager")

    monkeypatch.setattr(torch.nn.Module, "compile", compile_eagerly)
    tiny_run(pair, tmp_path / "run", "--compile")
    assert len(compiled) == 2  # the network, and the frozen copy of the stage
    tiny_run(pair, tmp_path / "plain")
    first, second = (
        load_checkpoint(tmp_path / name / "checkpoints" / "stage-1.pt")["network"]
        for name in ("run", "plain")
    )
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("_without_report")
def test_stages_start_from_given_weights_without_a_warm_up(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    torch.manual_seed(5)
    weights = DeepLab(NUM_CLASSES, depth=18).state_dict()
    torch.save({"DeepLab": {"model_state": weights}, "iter": 7}, tmp_path / "released.pkl")
    flags = ("--network", "deeplab18", "--weights", str(tmp_path / "released.pkl"))
    tiny_run(pair, tmp_path / "run", *flags, "--warmup-iterations", "0")
    parts = load_checkpoint(tmp_path / "run" / "checkpoints" / "warm-up.pt")
    assert all(torch.equal(parts["network"][name], value) for name, value in weights.items())


@pytest.mark.usefixtures("_without_report")
def test_frozen_batch_norm_stays_as_it_was(pair: tuple[Path, Path], tmp_path: Path) -> None:
    flags = ("--batch-norm", "freeze", "--network", "deeplab18")
    settings = tiny_run(pair, tmp_path / "run", *flags)
    before = initial(settings).state_dict()
    after = load_checkpoint(tmp_path / "run" / "checkpoints" / "stage-1.pt")["network"]
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name, p in initial(settings).named_parameters() if p.requires_grad}
    assert not any("bn" in name or "running" in name for name in moved)


def test_synchronized_batch_norm_is_in_every_place_and_loads_elsewhere(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    # Statistics over processes need GPUs; in evaluation it runs anywhere.
    arguments = ["--source", str(pair[0]), "--target", str(pair[1]), "--network", "deeplab18"]
    settings = parse_settings([*arguments, "--output", str(tmp_path), "--device", "cpu"])
    plain = initial(settings).eval()
    sync = dataclasses.replace(settings.network, batch_norm="sync")
    synced = initial(dataclasses.replace(settings, network=sync)).eval()
    norms = [m for m in synced.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    assert norms
    assert all(isinstance(norm, torch.nn.SyncBatchNorm) for norm in norms)
    plain.load_state_dict(synced.state_dict())
    images = torch.rand(1, 3, 33, 50)
    with torch.no_grad():
        torch.testing.assert_close(synced(images), plain(images))


@pytest.mark.usefixtures("_without_report")
@pytest.mark.parametrize("name", ["source", "agreement", "density"])
def test_a_stage_starts_from_the_best_network_of_the_one_before(
    name: str, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    flags = ("--evaluate-every", "1", "--max-iterations", "4", "--warmup-learning-rate", "0.03")
    # Without a teacher the stage's copy of the network stays the one it began with.
    tiny_run(pair, tmp_path / "run", *flags, "--best-by", name, "--teacher", "0")
    chosen = [e for e in events_of(tmp_path / "run") if e["kind"] == "selection"]
    scores = [e["scores"][name] for e in chosen if e["phase"] == "warm-up"]  # type: ignore[index]
    parts = load_checkpoint(tmp_path / "run" / "checkpoints" / "warm-up.pt")
    settings = parse_settings(["--preset", "gta5"])
    assert settings.training.best_by == "source"
    saved = parse_settings(["--preset", str(tmp_path / "run" / "settings.toml"), "--resume"])
    data, network = open_data(saved.data, Loading(0)), initial(saved)
    network.load_state_dict(parts["network"])
    again = select(network, data=data)[name]
    assert again == max(scores)
    stage = load_checkpoint(tmp_path / "run" / "checkpoints" / "stage-1.pt")["stored"]["stage"]
    for name, value in parts["network"].items():
        assert torch.equal(stage["labeler"][f"network.{name}"], value)


@pytest.mark.skipif(not DATA.is_dir(), reason="the real images are not beside this repository")
def test_one_step_of_the_published_network_from_true_files(tmp_path: Path) -> None:
    arguments = [
        *("--preset", "gta5", "--source", str(DATA / "gta5_sample")),
        *("--target", str(DATA / "cityscapes_sample"), "--output", str(tmp_path)),
        *("--resize", "width:1100", "--crop", "256", "448", "--stage-batch", "1"),
        *("--max-iterations", "1", "--evaluate-every", "0"),
        *("--workers", "0", "--device", "cpu", "--margin", "0"),
    ]
    settings = parse_settings(arguments)
    data = open_data(settings.data, Loading(0))
    # A crop stands for whole images, which take minutes on a CPU.
    crop = LabeledImages(data.source.pairs[:1], data.source.transform)
    data = dataclasses.replace(data, source_whole=crop, evaluation=crop, analysis=None)
    network = initial(settings)
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    run = Run(settings.run, settings.plain())
    experiment = train.Experiment(run, data, settings.training)
    train.train_stage(1, None, network, experiment, settings.stages)
    (event,) = [e for e in events_of(tmp_path) if e["kind"] == "losses"]
    terms = event["terms"]
    assert isinstance(terms, dict)
    assert terms["source"] > 0
    assert terms["anchor labels"] > 0
    assert terms["anchor distance"] > 0
    for name, parameter in network.named_parameters():
        assert parameter.isfinite().all(), name
    moved = [name for name, p in network.named_parameters() if not torch.equal(before[name], p)]
    assert len(moved) > 0.9 * len(before)
