"""The example runs whole, and its parts do what they say, on a tiny synthetic pair."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import method
import pytest
import torch
import train
from classes import CLASS_NAMES, IGNORE, NUM_CLASSES
from data import Data, open_data
from engine.files import load_checkpoint, save_checkpoint
from engine.loop import TrainingSettings, make_optimizer, scheduled
from method import begin_stage, mix, restore_stage
from networks.build import new_network
from networks.segmenter import Segmenter
from networks.small import SmallSegmenter
from scores import evaluate, margin_counts
from settings import Settings, parse_settings
from streams import Loading
from synthetic import write_synthetic_pair
from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]
    EventAccumulator,
)

UNKNOWN_TO_SYNTHIA = ("terrain", "truck", "train")
TINY = [
    *("--resize", "height:32", "--crop", "32", "48", "--workers", "0"),
    *("--warmup-iterations", "3", "--stages", "2", "--stage-iterations", "2", "--device", "cpu"),
]


def run(pair: tuple[Path, Path], output: Path, *flags: str) -> list[dict[str, object]]:
    """Adapt in this process and return the lines of metrics.jsonl."""
    output.mkdir()
    source, target = (str(folder) for folder in pair)
    arguments = ["--source", source, "--target", target, "--output", str(output), *TINY, *flags]
    train.adapt(arguments)
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def opened(settings: Settings) -> Data:
    return open_data(settings.data, Loading(settings.run.workers))


def initial(settings: Settings) -> Segmenter:
    return new_network(settings.network, settings.run.seed, torch.device("cpu"))


def network_of(output: Path, phase: str) -> dict[str, torch.Tensor]:
    parts = load_checkpoint(output / "checkpoints" / f"{phase}.pt")
    network: dict[str, torch.Tensor] = parts["network"]
    return network


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


WARM_UP = ["--warmup-iterations", "12"]


@pytest.fixture(scope="module")
def whole(pair: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run of all phases."""
    output = tmp_path_factory.mktemp("whole") / "run"
    run(pair, output, "--baseline", *WARM_UP)
    return output


def test_a_run_leaves_all_that_a_person_expects(whole: Path) -> None:
    events = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    evaluations = [e["phase"] for e in events if e["kind"] == "evaluation"]
    assert evaluations == ["source only", "warm-up", "stage 1", "stage 2"]
    losses = [(e["phase"], e["iteration"]) for e in events if e["kind"] == "losses"]
    assert losses == [
        *(("source only", i) for i in (1, 11)),
        *(("warm-up", i) for i in (1, 11)),
        *(("stage 1", 1), ("stage 2", 1)),
    ]
    labelers = [(e["phase"], e["labeler"]) for e in events if e["kind"] == "pseudo-labels"]
    assert labelers == [
        (f"stage {k}", labeler) for k in (1, 2) for labeler in ("anchor", "probability")
    ]
    left = {path.relative_to(whole).as_posix() for path in whole.rglob("*.*")}
    pictures = ("margins", "panels", "curves", "anchor_distances", "label_quality")
    assert left >= {
        *("metrics.jsonl", "report/iou.txt", "report/anchors.txt"),
        *(f"checkpoints/{name}.pt" for name in ("source-only", "warm-up", "stage-1", "stage-2")),
        *(f"report/{name}.png" for name in pictures),
    }
    assert not any(name.endswith(".tmp") for name in left)
    board = EventAccumulator(str(whole / "tensorboard"))
    board.Reload()
    assert {"anchor distances", "report/panels", "report/margins"} < set(board.Tags()["images"])
    anchors = (whole / "report" / "anchors.txt").read_text()
    assert [line for line in anchors.splitlines() if "stage" in line] == ["stage 1", "stage 2"]
    # A stage's labeler can be had back from its checkpoint alone.
    parts = load_checkpoint(whole / "checkpoints" / "stage-2.pt")
    stage = restore_stage(SmallSegmenter(NUM_CLASSES), parts["stored"]["stage"])
    assert stage.labeler(torch.rand(1, 3, 32, 48)).labels.shape == (1, 8, 12)


@pytest.mark.usefixtures("_without_report")
@pytest.mark.parametrize("labels", ["anchor", "agree", "rectify", "both"])
def test_other_labels_without_mixing(labels: str, pair: tuple[Path, Path], tmp_path: Path) -> None:
    flags = ["--labels", labels, "--no-mix", "--distance-weight", "0.1"]
    events = run(pair, tmp_path / "run", *flags)
    kinds = ["anchor", "probability"] if labels == "both" else [labels]
    labelers = [e["labeler"] for e in events if e["kind"] == "pseudo-labels"]
    assert labelers == 2 * kinds
    terms = [e["terms"] for e in events if e["kind"] == "losses" and e["phase"] == "stage 2"]
    assert isinstance(terms[0], dict)
    of_target = {f"{kind} {what}" for kind in kinds for what in ("labels", "distance")}
    assert terms[0].keys() == {"source", "source distance", *of_target}


def test_half_of_the_classes_of_an_image_are_pasted() -> None:
    labels = torch.tensor([[[0, 0, 1], [2, 4, IGNORE]], [[3, 3, 3], [3, IGNORE, 3]]])
    source, target = torch.ones(2, 3, 4, 6), torch.zeros(2, 3, 4, 6)
    whole = labels.repeat_interleave(2, 1).repeat_interleave(2, 2)
    guess = {"probability": torch.full((2, 2, 3), 1)}
    weight = torch.tensor([2.0, 3.0, 4.0, 5.0, 6.0])
    drawn = set()
    for seed in range(20):
        torch.manual_seed(seed)
        mixed = mix(source, whole, target, guess, weight, num_classes=5)
        pasted = mixed.images[:, 0, ::2, ::2] == 1
        assert torch.equal(
            mixed.images,
            pasted[:, None]
            .repeat_interleave(2, 2)
            .repeat_interleave(2, 3)
            .expand(-1, 3, -1, -1)
            .float(),
        )
        first, second = labels[0][pasted[0]].unique().tolist(), labels[1][pasted[1]].tolist()
        assert len(first) == 2  # of four; a class is pasted whole or not at all
        assert (pasted[0] == torch.isin(labels[0], torch.tensor(first))).all()
        assert second == 5 * [3]
        assert torch.equal(mixed.pseudo["probability"], torch.where(pasted, labels, 1))
        of_class = torch.where(labels == IGNORE, 0.0, weight[labels.clamp(max=4)])
        assert torch.equal(mixed.of_source, torch.where(pasted, of_class, 0.0))
        drawn |= {*first}
    assert drawn == {0, 1, 2, 4}


@pytest.mark.usefixtures("_without_report")
@pytest.mark.parametrize(
    ("flags", "weighed"),
    [
        ((), True),
        (("--labels", "agree"), True),
        (("--probability", "0.01"), False),
        (("--mix",), False),  # true labels of pasted pixels weigh by their class
    ],
)
def test_labels_of_every_pixel_weigh_as_much_as_part_of_them_is_sure(
    flags: tuple[str, ...],
    weighed: bool,
    pair: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(method, "SURE", 2.0)  # no pixel is
    preset = ["--preset", "self-training", "--no-mix", "--stages", "1"]
    events = run(pair, tmp_path / "run", *preset, *flags)
    terms = [e["terms"] for e in events if e["kind"] == "losses" and e["phase"] == "stage 1"]
    assert isinstance(terms[0], dict)
    (of_labels,) = (value for name, value in terms[0].items() if name.endswith("labels"))
    assert (of_labels == 0) == weighed


@pytest.mark.usefixtures("_without_report")
def test_the_teacher_follows_the_trained_network(pair: tuple[Path, Path], tmp_path: Path) -> None:
    for name, decay in (("frozen", "0"), ("moving", "0.5")):
        flags = ["--stages", "1", "--stage-iterations", "1", "--teacher", decay]
        run(pair, tmp_path / name, *flags)
        before = network_of(tmp_path / name, "warm-up")
        parts = load_checkpoint(tmp_path / name / "checkpoints" / "stage-1.pt")
        teacher = restore_stage(SmallSegmenter(NUM_CLASSES), parts["stored"]["stage"]).labeler
        weights = dict(teacher.network.named_parameters())
        if name == "frozen":
            assert all(torch.equal(value, before[key]) for key, value in weights.items())
        else:  # halfway to what the stage ends with: the average of a single step
            for key, value in weights.items():
                expected = (before[key] + parts["network"][key]) / 2
                torch.testing.assert_close(value.detach(), expected, msg=key)


@pytest.mark.usefixtures("_without_report")
def test_target_training_labels_do_not_reach_training(
    whole: Path, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    source, target = pair
    bare = tmp_path / "bare"
    shutil.copytree(target, bare)
    shutil.rmtree(bare / "gtFine" / "train")
    events = run((source, bare), tmp_path / "without", *WARM_UP)
    assert not any(e["kind"] == "pseudo-labels" for e in events)
    assert same(network_of(whole, "stage-2"), network_of(tmp_path / "without", "stage-2"))


@pytest.mark.usefixtures("_without_report")
def test_same_seed_same_bits_also_from_a_warm_up_checkpoint(
    pair: tuple[Path, Path], whole: Path, tmp_path: Path
) -> None:
    checkpoint = whole / "checkpoints" / "warm-up.pt"
    run(pair, tmp_path / "rest", *WARM_UP, "--warmup-checkpoint", str(checkpoint))
    adapted = network_of(whole, "stage-2")
    assert same(adapted, network_of(tmp_path / "rest", "stage-2"))
    flags = [*WARM_UP, "--seed=4", "--warmup-checkpoint", str(checkpoint)]
    run(pair, tmp_path / "other", *flags)
    assert not same(adapted, network_of(tmp_path / "other", "stage-2"))


def test_a_warm_up_in_progress_is_none_to_start_from(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    save_checkpoint(tmp_path / "unfinished.pt", {"settings": {}, "networks": {}})
    with pytest.raises(ValueError, match=r"unfinished.pt is not a checkpoint of a phase: it lacks"):
        run(pair, tmp_path / "run", "--warmup-checkpoint", str(tmp_path / "unfinished.pt"))


def test_synthia_is_evaluated_on_the_classes_it_knows(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, _ = write_synthetic_pair(
        tmp_path / "pair", seed=0, source_images=5, target_images=1, val_images=1, height=48,
        source_format="synthia",
    )  # fmt: skip
    flags = ["--source-format", "synthia", "--stages", "0", "--network", "deeplab18"]
    run((source, pair[1]), tmp_path / "run", *flags)
    table = (tmp_path / "run" / "report" / "iou.txt").read_text()
    assert [line.split()[:3] for line in table.splitlines()[-2:]] == [
        *(["mIoU", "of", "16"], ["mIoU", "of", "13"]),
    ]
    assert table in capsys.readouterr().out
    arguments = ["--source", str(source), "--target", str(pair[1]), "--output", "none", *TINY]
    truth = {}
    for source_format in ("gta5", "synthia"):
        settings = parse_settings([*arguments, "--source-format", "synthia"])
        data = opened(settings)
        if source_format == "gta5":
            data = dataclasses.replace(data, evaluated=tuple(range(NUM_CLASSES)))
        confusion = evaluate(initial(settings), data.evaluation, data)
        truth[source_format] = confusion.counts.sum(dim=1)
    unknown = torch.tensor([name in UNKNOWN_TO_SYNTHIA for name in CLASS_NAMES])
    assert truth["gta5"][unknown].any()
    assert torch.equal(truth["synthia"], truth["gta5"].masked_fill(unknown, 0))


@pytest.mark.parametrize("margin", ["coverage:0.5", "precision:0.1"])
def test_margins_are_chosen_class_by_class(
    margin: str, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    source, target = (str(folder) for folder in pair)
    arguments = ["--source", source, "--target", target, "--output", str(tmp_path), *TINY]
    settings = parse_settings([*arguments, "--margin", margin])
    data = opened(settings)
    stage = begin_stage(initial(settings), data, settings.stages)
    minimum = stage.labeler.by_anchor.min_margin
    assert minimum.shape == (NUM_CLASSES,)
    domain = data.analysis if margin.startswith("coverage") else data.held_out
    assert domain is not None
    curve = margin_counts(stage, domain, data).curve()
    seen = 0
    for c in minimum.isfinite().nonzero().flatten().tolist():
        at = curve.min_scores.tolist().index(minimum[c].item())
        reached = curve.coverage if margin.startswith("coverage") else curve.precision
        assert reached[c, at].item() >= float(margin[-3:])
        seen += 1
    assert seen


def test_the_held_out_tenth_is_not_trained_on(pair: tuple[Path, Path]) -> None:
    arguments = ["--source", str(pair[0]), "--target", str(pair[1]), "--output", "none", *TINY]
    data = opened(parse_settings(arguments))
    assert (len(data.source), len(data.source_whole), len(data.held_out)) == (4, 4, 1)
    held_out = data.held_out[0][0]
    assert not any(torch.equal(data.source_whole[i][0], held_out) for i in range(4))


def test_rare_classes_weigh_more_and_the_mean_over_pixels_is_one(pair: tuple[Path, Path]) -> None:
    arguments = ["--source", str(pair[0]), "--target", str(pair[1]), "--output", "none", *TINY]
    data = opened(parse_settings(arguments))
    whole = data.source_whole
    labels = torch.cat([whole[i][1].flatten() for i in range(len(whole))])
    counts = torch.bincount(labels[labels < NUM_CLASSES], minlength=NUM_CLASSES)
    weight = data.class_weight
    assert weight is not None
    assert weight.isfinite().all()
    assert (weight[labels[labels < NUM_CLASSES]].double().mean() - 1).abs() < 1e-5
    by_count = weight[counts.sort().indices]
    assert (by_count.diff() <= 0).all()
    often = counts / counts.sum() > 1e-4
    products = (weight * counts.sqrt())[often]
    torch.testing.assert_close(products, products.mean().expand_as(products))


def test_the_learning_rate_rises_and_falls() -> None:
    network = SmallSegmenter(NUM_CLASSES)
    training = TrainingSettings()
    optimizer, schedule = scheduled(make_optimizer(network, 0.5, training), 40, training.rise)
    rates = []
    for _ in range(40):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[0] == pytest.approx(0.25)
    assert rates[1] == pytest.approx(0.5 * (1 - 1 / 40) ** 0.9)
    assert rates[1:] == sorted(rates[1:], reverse=True)
    assert 0 < rates[-1] < 0.02


@pytest.mark.parametrize("preset", ["gta5", "synthia"])
def test_presets_are_optimized_as_published(preset: str) -> None:
    settings = parse_settings(["--preset", preset])
    count, rate = settings.stages.stage_iterations, settings.stages.stage_learning_rate
    training = settings.training
    network = SmallSegmenter(NUM_CLASSES)
    optimizer, schedule = scheduled(make_optimizer(network, rate, training), count, training.rise)
    assert isinstance(optimizer, torch.optim.SGD)
    (group,) = optimizer.param_groups
    assert (group["momentum"], group["weight_decay"]) == (0.9, 2e-4)
    assert isinstance(schedule, torch.optim.lr_scheduler.LambdaLR)
    (factor,) = schedule.lr_lambdas
    for iteration in (0, 1, 45_000, 89_999):
        expected = 1e-4 * (1 - iteration / 90_000) ** 0.9
        assert rate * factor(iteration) == pytest.approx(expected, rel=1e-12)


@pytest.fixture
def broken(pair: tuple[Path, Path], tmp_path: Path) -> Path:
    return shutil.copytree(pair[0], tmp_path / "broken")


def said_of(
    monkeypatch: pytest.MonkeyPatch, source: Path, target: Path, output: Path, *flags: str
) -> str:
    """Return the message with which the command line stops."""
    arguments = ["--source", str(source), "--target", str(target), "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments, *TINY, *flags])
    with pytest.raises(SystemExit) as stopped:
        train.main()
    return str(stopped.value)


def test_what_is_missing_is_said_before_training(
    broken: Path,
    pair: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (broken / "labels" / "00002.png").unlink()
    assert "00002.png has no label" in said_of(monkeypatch, broken, pair[1], tmp_path / "out")
    assert "warm-up" not in "".join(capsys.readouterr())


def test_a_file_broken_inside_is_named_from_a_worker(
    broken: Path, pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = broken / "images" / "00003.png"
    content = bytearray(image.read_bytes())
    content[200:260] = bytes(60)
    image.write_bytes(bytes(content))
    said = said_of(monkeypatch, broken, pair[1], tmp_path / "out", "--workers", "1")
    assert said.startswith(f"error: {image} is not a readable image")


DATA = Path(__file__).resolve().parents[3] / "shared" / "data"


@pytest.mark.skipif(not DATA.is_dir(), reason="the real images are not beside this repository")
def test_real_images_in_their_true_formats(tmp_path: Path) -> None:
    pair = DATA / "gta5_sample", DATA / "cityscapes_sample"
    events = run(pair, tmp_path / "run", "--stages", "1", "--max-iterations", "1")
    phases = [event["phase"] for event in events if event["kind"] == "evaluation"]
    assert phases == ["warm-up", "stage 1"]
    assert (tmp_path / "run" / "report" / "panels.png").exists()
