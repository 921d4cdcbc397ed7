"""The benchmarks accept right answers, refuse wrong ones, and write down what they promise."""

import csv
import math
import re
import subprocess
import sys
from pathlib import Path

import one_pass
import operators
import own_images
import pytest
import selection
import startup
import step
import torch
from family import FAMILY
from operators import OPERATORS, OURS, Answer, Case, Inputs, measure
from selection import RATE, SCORES, TARGET, WARM_UP, Checkpoint
from settings import parse_settings

SMALL = Case((2, 5, 7), dim=9, classes=4)
CASES = [
    SMALL,
    SMALL._replace(layout="channels-last"),
    SMALL._replace(shape=(70,), layout="(P, D)"),
    SMALL._replace(dtype="bfloat16"),
    SMALL._replace(dtype="float16", layout="channels-last"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.layout}, {case.dtype}")
@pytest.mark.parametrize("name", OPERATORS)
def test_ours_are_accepted_in_every_layout_and_dtype(name: str, case: Case) -> None:
    floor, ours = measure(name, OPERATORS[name].alone(), case, "cpu", repeats=1)
    assert (floor.contender, ours.contender) == (OPERATORS[name].floor_name, OURS)
    assert floor.ratio == 1
    assert ours.ratio == ours.ms / floor.ms
    assert (ours.pixels, ours.dim, ours.classes) == (70, 9, 4)
    inputs = operators.draw(case, "cpu")
    assert inputs.features.dtype == inputs.anchors.dtype == getattr(torch, case.dtype)
    assert (inputs.features.stride(1) == 1) == (case.layout != "NCHW")


@pytest.mark.parametrize("name", [*OPERATORS, *FAMILY])
def test_all_contenders_are_accepted(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    operator = (OPERATORS | FAMILY)[name]
    rows = measure(name, operator, SMALL, "cpu", repeats=1)
    assert [row.contender for row in rows] == [operator.floor_name, *operator.contenders]
    assert capsys.readouterr().out == ""


def spoiled(part: int, value: float) -> operators.Contender:
    """Return the class sums with one value of one part of them changed."""

    def run(inputs: Inputs) -> Answer:
        answer = [tensor.clone() for tensor in operators.sums(inputs)]
        answer[part].view(-1)[3] = value
        return tuple(answer)

    return run


@pytest.mark.parametrize(
    "wrong",
    [
        spoiled(0, 0.0),
        spoiled(0, torch.nan),
        spoiled(1, 0),
        lambda inputs: tuple(tensor[:-1] for tensor in operators.sums(inputs)),
    ],
    ids=["a sum", "a NaN", "a count", "a shape"],
)
def test_a_wrong_contender_is_refused(
    wrong: operators.Contender, capsys: pytest.CaptureFixture[str]
) -> None:
    operator = OPERATORS["class sums"].alone()
    operator.contenders["wrong"] = wrong
    rows = measure("class sums", operator, SMALL, "cpu", repeats=1)
    assert [row.contender for row in rows] == ["product", OURS]
    assert capsys.readouterr().out == "class sums: wrong is left out, its answers differ\n"


def test_a_label_may_differ_only_where_its_margin_is_at_the_minimum(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inputs = operators.draw(SMALL, "cpu")
    _, margins = operators.true_labels(inputs.double())
    monkeypatch.setattr(operators, "MIN_MARGIN", margins[11].item())
    truth = operators.true_labels(inputs.double())
    labels, margins = operators.label(inputs)
    for pixel in range(len(labels)):
        others = labels.clone()
        others[pixel] = 3 if labels[pixel] == 2 else 2
        at_minimum = abs(margins[pixel] - margins[11]) <= 1e-3 * margins.max()
        assert operators.is_right((others, margins), truth) == at_minimum
    assert operators.is_right((labels, margins), truth)


def test_ours_are_refused_too_where_they_are_wrong() -> None:
    operator = OPERATORS["class sums"]._replace(contenders={OURS: spoiled(0, 0.0)})
    with pytest.raises(AssertionError, match="our own answers differ"):
        measure("class sums", operator, SMALL, "cpu", repeats=1)


PEAK = """
import operators, torch

def run():
    first = torch.ones(2**24)
    second = torch.ones(2**23, dtype=torch.float64)
    del first, second
    torch.ones(3 * 2**23)

run()
print(operators.peak_bytes(run, "cpu"))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="measured in Linux alone")
def test_peak_bytes_is_the_most_that_is_held_at_once() -> None:
    """In a process of its own: what other tests hold and free is counted, too."""
    folder = Path(operators.__file__).parent
    output = subprocess.run(
        [sys.executable, "-c", PEAK], cwd=folder, check=True, capture_output=True, text=True
    ).stdout
    assert abs(int(output) - 2**27) < 2**21


def test_a_busy_run_writes_the_contenders_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operators, "optional_labelers", lambda device: {})
    arguments = ["--pixels", "1", "6", "7", "--repeats", "1", "--busy", "1"]
    monkeypatch.setattr(sys, "argv", ["operators.py", *arguments, "--output", str(tmp_path)])
    operators.main()
    with (tmp_path / "operators.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {(row["table"], row["busy"]) for row in rows} == {("contenders", "1")}
    of_ours = [row["operator"] for row in rows if row["contender"] == "anchorda, one thread"]
    assert of_ours == list(OPERATORS)


def test_a_run_writes_the_documented_columns_and_a_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(operators, "optional_labelers", lambda device: {})  # one compiles
    monkeypatch.setattr(operators, "WARM_UPS", 0)
    few = dict.fromkeys(operators.sweeps((1, 6, 7)), CASES[:1])
    monkeypatch.setattr(operators, "sweeps", lambda shape: few)
    arguments = ["--pixels", "1", "6", "7", "--repeats", "2", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["operators.py", *arguments])
    operators.main()

    with (tmp_path / "operators.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    described = re.findall(r"^- ([\w, ]+):", operators.__doc__ or "", re.MULTILINE)
    assert set(", ".join(described).split(", ")) == set(rows[0])
    assert {row["table"] for row in rows} == {"contenders", "layouts", *few}
    assert all(row["machine"] and row["torch"] == torch.__version__ for row in rows)
    assert all(float(row["low"]) <= float(row["ms"]) <= float(row["high"]) for row in rows)
    of_layouts = {(row["layout"], row["dtype"]) for row in rows if row["table"] == "layouts"}
    assert len(of_layouts) == 9
    assert (tmp_path / "operators.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert printed.count("| :-- |") == 3
    assert rows[0]["machine"] in printed


def test_sweeps_vary_one_thing_at_a_time() -> None:
    for field, cases in operators.sweeps((2, 128, 224)).items():
        varied = "shape" if field == "pixels" else field
        first, *others = cases
        assert len({getattr(case, varied) for case in cases}) == len(cases)
        assert {case._replace(**{varied: getattr(first, varied)}) for case in others} == {first}


def test_the_step_by_hand_is_the_example_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "REPEATS", 1)
    settings = parse_settings(["--crop", "32", "48", "--device", "cpu"])
    rows = step.measure(settings)
    assert [row[0] for row in rows] == ["anchorda", "by hand"]

    wrong = step.BY_HAND._replace(pull=lambda features, labels, anchors: features.mean())
    monkeypatch.setattr(step, "WAYS", step.WAYS | {"by hand": wrong})
    with pytest.raises(AssertionError, match="by hand: source distance is"):
        step.measure(settings)


def test_startup_measures_each_statement_in_a_fresh_interpreter() -> None:
    first, second = startup.milliseconds("import json", "assert json")
    assert min(first, second) > 0


def test_one_pass_has_a_line_for_each_score(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def scores(*files: Path, probes: tuple[int, ...], **settings: object) -> one_pass.Scores:
        probe = {f"linear probe {seed}": [50.0 + seed, 30.0] for seed in probes}
        return {"discriminant": [49.0, 32.0]} | probe

    monkeypatch.setattr("frozen_features.main", scores)
    for name in ("lay_out", "write_folders"):
        monkeypatch.setattr(one_pass, name, lambda *arguments, **settings: None)
    one_pass.main(tmp_path, tmp_path / "camvid", tmp_path / "carla", seeds=(0, 1, 2))
    with (tmp_path / "frozen_features.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    probes = [row for row in rows if row["classifier"] == "linear probe"]
    assert len(probes) == 3 * 2 * 3  # pairs, domains, seeds
    assert {row["miou"] for row in probes} == {"50.0000", "51.0000", "52.0000", "30.0000"}
    # Anchors have no seed, but the synthetic pair does.
    assert len(rows) - len(probes) == 2 * (1 + 1 + 3)
    assert "| linear probe | 51.0 ± 1.0 | 30.0 ± 0.0 |" in capsys.readouterr().out


def test_own_images_tables_and_layout(tmp_path: Path) -> None:
    runs: list[own_images.Scores] = [
        {
            "source only": {"road": 0.5, "moon": math.nan, "mean": 0.5},
            "control": {"road": 0.52 + seed / 100, "moon": math.nan, "mean": 0.52 + seed / 100},
            "adapted": {"road": 0.6, "moon": math.nan, "mean": 0.6},
        }
        for seed in range(2)
    ]
    table = own_images.tables("day", runs, [0, 1])
    assert "| control | 52.0 | 53.0 | **52.5** ± 0.7 |" in table
    assert "| adapted − control | +8.0 | +7.0 | **+7.5** ± 0.7 |" in table
    assert "| moon | – | – | – |" in table

    for name in ("source/images/1.png", "source/labels/1.png", "target/gtFine/train/a/no.png"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).touch()
    for split in ("train", "val"):
        for kind, ending in (("leftImg8bit", "leftImg8bit"), ("gtFine", "gtFine_labelIds")):
            path = tmp_path / "in" / "target" / kind / split / "dusk" / f"dusk_1_{ending}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    own_images.lay_out(tmp_path / "in", tmp_path / "out")
    own_images.lay_out(tmp_path / "in", tmp_path / "out")  # once more
    found = [path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*.png")]
    assert sorted(map(str, found)) == [
        *("source/images/1.png", "source/labels/1.png"),
        *("target/images/train_dusk_1.png", "target/images/val_dusk_1.png"),
        "target/labels/val_dusk_1.png",  # those of the images to adapt to stay away
    ]


def checkpoint(seed: int, method: str, step: int, truth: float, density: float) -> Checkpoint:
    scores = dict.fromkeys(SCORES, 0.5) | {TARGET: truth, "density": density}
    return Checkpoint("synthetic", seed, method, RATE, step, scores)


def test_selection_judges_picks_over_all_checkpoints_and_within_runs(tmp_path: Path) -> None:
    checkpoints = [
        checkpoint(0, WARM_UP, 1, truth=0.2, density=1.0),
        checkpoint(0, WARM_UP, 2, truth=0.4, density=2.0),
        checkpoint(0, "self-training", 1, truth=0.5, density=3.0),
        checkpoint(0, "self-training", 2, truth=0.3, density=math.nan),
        checkpoint(0, "SHOT", 1, truth=0.3, density=5.0),
        checkpoint(0, "SHOT", 2, truth=0.2, density=4.0),
    ]
    selection.write_csv(checkpoints, tmp_path / "results.csv")
    read = selection.read_csv(tmp_path / "results.csv")
    assert [c[:5] for c in read] == [c[:5] for c in checkpoints]
    warm_up, adapted, collapsed = selection.runs_of(read)
    assert [c.step for c in adapted] == [2, 1, 2]  # the first is the network it starts from
    assert selection.correlation(warm_up, "density") == pytest.approx(1)
    assert selection.correlation(collapsed, "density") == pytest.approx(-0.5)
    assert math.isnan(selection.correlation(read, "information"))  # constant
    assert selection.pick(adapted, "density").scores[TARGET] == 0.5
    # Over all, density picks 0.3 and the best is 0.5; within runs it loses 0, 0 and 10 points.
    _, _, over_all, within = selection.of_seed(read, "density")
    assert (over_all, within) == pytest.approx((20, 10 / 3))
    last = selection.without_choice(read)["last step"]
    assert last[2:] == pytest.approx([20, (0 + 20 + 20) / 3])
    (row,) = re.findall(r"\| density \| (.*) \|", selection.table(read, "synthetic"))
    assert row.split(" | ")[2:] == ["20.0 ± 0.0", "3.3 ± 0.0"]
    assert "| last step | – | – | 20.0 ± 0.0 | 13.3 ± 0.0 |" in selection.table(read, "synthetic")
