"""Defaults, presets and flags; every wrong one is an error that names it."""

import dataclasses
import re
from pathlib import Path

import pytest
from method import margin_rules
from settings import PRESETS, Settings, parse_settings

NAMES = [field.name for group in Settings().groups() for field in dataclasses.fields(group)]


def said_of(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    """Return the message of the command line for wrong flags."""
    with pytest.raises(SystemExit) as raised:
        parse_settings([*flags, "--device", "cpu"])
    assert raised.value.code == 2
    # In a box, a long message is broken into lines.
    return re.sub(r"[\s│|]+", " ", capsys.readouterr().err)


def test_flags_win_over_presets_and_presets_over_defaults(tmp_path: Path) -> None:
    preset = tmp_path / "mine.toml"
    preset.write_text("seed = 5\nstages = 7\ncrop = [30, 40]\nteacher = 0\nbaseline = true\n")
    settings = parse_settings(["--preset", str(preset), "--stages", "2", "--no-baseline"])
    assert (settings.run.seed, settings.stages.stages, settings.data.crop) == (5, 2, (30, 40))
    assert settings.warm_up.baseline is False
    assert (settings.training.teacher, type(settings.training.teacher)) == (0.0, float)
    assert settings.warm_up == Settings().warm_up


@pytest.mark.parametrize("preset", ["gta5", "synthia"])
def test_presets_are_the_published_settings(preset: str) -> None:
    settings = parse_settings(["--preset", preset])
    expected = {
        "source_format": preset,
        "resize": "width:2200",
        "crop": [512, 896],
        "photometric": False,
        "class_weights": False,
        "network": "deeplab101",
        "warmup": "adversarial",
        "stages": 3,
        "stage_iterations": 90_000,
        "stage_batch": 4,
        "stage_learning_rate": 1e-4,
        "optimizer": "sgd",
        "weight_decay": 2e-4,
        "rise": 0.0,
        "teacher": 0.0,
        "labels": "both",
        "mix": False,
        "margin": "2.5",
        "probability": 0.95,
        "distance_weight": 0.7,
    }
    plain = settings.plain()
    assert {name: plain[name] for name in expected} == expected
    assert {path.stem for path in PRESETS.glob("*.toml")} == {"gta5", "self-training", "synthia"}


def test_self_training_is_a_preset_of_the_stages_alone() -> None:
    flags = ["--preset", "self-training"]
    default, changed = (parse_settings(given).plain() for given in ([], flags))
    assert {name: value for name, value in changed.items() if value != default[name]} == {
        "labels": "probability",
        "mix": True,
        "margin": "0",
        "probability": 0.0,
        "distance_weight": 0.0,
        "teacher": 0.99,
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("stage-iteration = 5", "there is no setting 'stage-iteration'. Did you mean 'stage-iter"),
        ("stage_iterations = 5", "there is no setting 'stage_iterations'. Did you mean"),
        ("resume-at = 5", "there is no setting 'resume-at'."),
        ('seed = "zero"', "seed cannot be 'zero'"),
        ("seed = true", "seed cannot be True"),
        ("probability = true", "probability cannot be True"),
        ("crop = [1, 2, 3]", "crop cannot be [1, 2, 3]"),
        ("crop = 128", "crop cannot be 128"),
        ('labels = "none"', "labels cannot be 'none'"),
        (
            'labels = "none"',
            "Expected one of ('probability', 'anchor', 'agree', 'rectify', 'both')",
        ),
        ("baseline = 1", "baseline cannot be 1"),
        ("seed = ", "is not a TOML file"),
    ],
)
def test_a_wrong_preset_is_named(
    content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    preset = tmp_path / "mine.toml"
    preset.write_text(content)
    said = said_of(capsys, "--preset", str(preset))
    assert str(preset) in said
    assert message in said


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--preset", "gta"],
            "there is no preset 'gta': expected gta5, self-training, synthia, or a TOML file",
        ),
        (["--source", "x"], "--source and --target belong together: give both, or neither"),
        (["--stage-iterations", "0"], "--stage-iterations: expected a number of at least 1"),
        (["--stages", "-1"], "--stages: expected a number of at least 0, got -1"),
        (["--seed", "-1"], "--seed: expected a number of at least 0, got -1"),
        (["--probability", "95"], "--probability: expected a number in [0, 1], got 95.0"),
        (["--teacher", "nan"], "--teacher: expected a number in [0, 1], got nan"),
        (["--resize", "144"], "--resize: expected height:PIXELS or width:PIXELS, got '144'"),
        (["--resize", "depth:9"], "--resize: expected height:PIXELS or width:PIXELS"),
        (["--crop", "0", "9"], "--crop: expected two sizes of at least 1"),
        (["--resize", "height:100"], "--crop (128, 192) is larger than --resize height:100"),
        (["--resize", "width:100"], "--crop (128, 192) is larger than --resize width:100"),
        (
            ["--network", "unet"],
            "invalid choice 'unet' for argument '--network'. Expected",
        ),
        (["--accumulate", "3"], "--warmup-batch 4 cannot be split into --accumulate 3 equal parts"),
        (["--accumulate", "4"], "--stage-batch 2 cannot be split into --accumulate 4 equal parts"),
        (["--backbone", "weights.pth"], "--backbone and --weights are of other networks"),
        (
            ["--backbone", "nowhere.pth", "--network", "deeplab50"],
            "there is no file of weights nowhere.pth",
        ),
        (
            ["--backbone", "a", "--weights", "b", "--network", "segformer-b0"],
            "--weights are of a whole network, its backbone included: give one",
        ),
        (["--warmup-checkpoint", "nowhere.pt"], "there is no warm-up checkpoint nowhere.pt"),
        (["--batch-norm", "sync"], "--batch-norm sync works on GPUs alone"),
        (
            ["--objective", "released", "--mix"],
            "--objective released always has --labels both and --no-mix",
        ),
        (["--stage-iter", "5"], "Unrecognized options: --stage-iter"),
        (["--labels", "none"], "invalid choice 'none' for argument '--labels'"),
    ],
)
def test_a_wrong_flag_is_named(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in said_of(capsys, *flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--warmup-batch 4 cannot be split into --accumulate 1 equal parts for each of 3 proc"),
        (["--warmup-batch", "3"], "--stage-batch 2 cannot be split into --accumulate 1 equal"),
        (
            ["--warmup-batch", "6", "--stage-batch", "9", "--accumulate", "2"],
            "--stage-batch 9 cannot be split into --accumulate 2 equal parts for each of 3 proc",
        ),
    ],
)
def test_batches_that_processes_cannot_share_are_named_before_a_warm_up(
    flags: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert message in said_of(capsys, *flags)
    assert parse_settings(["--warmup-batch", "6", "--stage-batch", "3"]).stages.stage_batch == 3


@pytest.mark.parametrize(
    "margin",
    ["high", "coverage:", "precision:1.5", "quantile:0.5", ":1", "2,", "", "nan", "a:coverage:1"],
)
def test_a_wrong_margin_is_named(margin: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = said_of(capsys, "--margin", margin)
    assert "expected a number, coverage:Q or precision:P with Q, P in [0, 1]" in said


def test_margins_are_split_into_rules() -> None:
    assert margin_rules("2.5") == [("", 2.5)]
    assert margin_rules("inf") == [("", float("inf"))]
    assert margin_rules("coverage:0.2,precision:0.5,-1") == [
        *(("coverage", 0.2), ("precision", 0.5), ("", -1.0)),
    ]


def test_what_is_saved_is_a_preset_of_the_same_settings(tmp_path: Path) -> None:
    folder = tmp_path / 'a "quoted" \\ ünï'
    settings = parse_settings(
        [
            *("--output", str(folder), "--source", str(folder / "s"), "--target", "Städte"),
            *("--crop", "20", "30", "--probability", "1e-7", "--baseline", "--margin", "inf"),
            *("--device", "cpu"),
        ]
    )
    settings.save(tmp_path / "settings.toml")
    assert parse_settings(["--preset", str(tmp_path / "settings.toml")]) == settings


def test_a_run_goes_on_with_the_same_settings_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--output", str(tmp_path), "--seed", "3"]
    assert parse_settings([*flags, "--resume"]).run.seed == 3  # nothing there: it begins
    parse_settings(flags).save(tmp_path / "settings.toml")
    settings = parse_settings(
        [*flags, "--resume", "--workers", "7", "--threads", "1", "--checkpoint-every", "9"]
    )
    assert settings.run.workers == 7
    said = said_of(capsys, "--output", str(tmp_path), "--resume")
    assert "holds a run with --seed 3, but now it is 0" in said
    saved = str(tmp_path / "settings.toml")
    assert parse_settings(["--preset", saved, "--resume"]).run.seed == 3


def test_an_earlier_run_is_not_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "metrics.jsonl").write_text("precious")
    said = said_of(capsys, "--output", str(tmp_path))
    assert "already holds a run: go on with it by --resume" in said


def test_every_setting_has_a_flag_with_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        parse_settings(["--help"])
    assert raised.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for name in NAMES:
        assert re.search(rf"--{name.replace('_', '-')}[ ,]", text), name
    assert text.count("(default: ") > 30


def test_without_torchrun_there_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "3")  # of something else: without torchrun there is one
    assert parse_settings([]).warm_up.warmup_batch == 4


def test_a_phase_is_cut_at_max_iterations() -> None:
    assert parse_settings(["--max-iterations", "3"]).training.iterations(10) == 3
    assert parse_settings(["--max-iterations", "3"]).training.iterations(2) == 2
    assert parse_settings([]).training.iterations(10) == 10


def test_the_flags_of_the_first_release_are_still_there() -> None:
    first = (
        "output source target source-format resize crop photometric class-weights network weights "
        "backbone batch-norm warmup warmup-checkpoint warmup-iterations warmup-batch "
        "warmup-learning-rate adversarial-weight discriminator-learning-rate baseline stages "
        "stage-iterations stage-batch stage-learning-rate objective labels margin probability "
        "distance-weight teacher optimizer weight-decay rise accumulate precision max-iterations "
        "resume checkpoint-every evaluate-every best-by seed workers threads device compile"
    )
    assert {name.replace("_", "-") for name in NAMES} >= set(first.split())
