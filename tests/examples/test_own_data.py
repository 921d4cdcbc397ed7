"""Data of one's own through the trainer: classes, folders, files that are bad or have changed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
import train
from engine.files import load_checkpoint, save_checkpoint
from engine.run import ResumeError
from numpy.typing import NDArray
from PIL import Image
from readers import DatasetError, DatasetWarning

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
TINY = [
    *("--resize", "height:32", "--crop", "32", "32", "--workers", "0", "--device", "cpu"),
    *("--warmup-iterations", "11", "--stages", "1", "--stage-iterations", "2"),
    *("--source-format", "folder", "--target-format", "folder", "--probability", "0"),
]
IDS = {"soil": (11,), "crop": (12, 13), "weed": (300,), "stone": (15,), "sky": (16,)}


def write_pair(folder: Path, index: int, size: tuple[int, int], ids: list[int]) -> None:
    """An image of blocks whose brightness tells their class, as jpg, and its label, as png."""
    rng = np.random.default_rng(index)
    labels: NDArray[np.uint16] = rng.choice(ids, (4, 5)).astype(np.uint16)
    labels = labels.repeat(12, 0).repeat(12, 1)[: size[0], : size[1]]
    for part in ("images", "labels"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    gray = Image.fromarray((labels * 13 % 256).astype(np.uint8)).convert("RGB")
    gray.save(folder / "images" / f"field {index}.JPG")
    Image.fromarray(labels).save(folder / "labels" / f"field {index}.png")


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a source without sky, a target of other sizes, and the list of five classes."""
    root = tmp_path_factory.mktemp("own")
    for index in range(6):
        write_pair(root / "source", index, (40, 50), [11, 12, 13, 300, 15, 99])
    for index in range(5):
        write_pair(root / "target", index, (36 + index, 44), [11, 12, 13, 300, 15, 16])
    lines = (f"{name}: {', '.join(map(str, ids))}" for name, ids in IDS.items())
    (root / "classes.txt").write_text("\n".join(lines))
    return root


def flags_of(own: Path, output: Path, *flags: str) -> list[str]:
    return [
        *("--source", str(own / "source"), "--target", str(own / "target")),
        *("--classes", str(own / "classes.txt"), "--output", str(output), *TINY, *flags),
    ]


@pytest.fixture(scope="module")
def finished(own: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("finished") / "run"
    train.adapt(flags_of(own, output))
    return output


def test_a_run_on_own_classes(own: Path, finished: Path, tmp_path: Path) -> None:
    events = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    terms = next(event["terms"] for event in events if event["kind"] == "losses")
    assert terms["source"] > 0.1
    ious = [event["iou"] for event in events if event["kind"] == "evaluation"]
    assert [list(iou) for iou in ious] == [list(IDS)] * 2
    assert all(iou["sky"] is None for iou in ious)  # no source, no score
    table = (finished / "report" / "iou.txt").read_text()
    assert "crop" in table
    assert "sky" not in table
    assert {path.name for path in (finished / "report").iterdir()} >= {"panels.png", "margins.png"}
    parts = load_checkpoint(finished / "checkpoints" / "stage-1.pt")
    assert parts["classes"]["names"] == list(IDS)
    assert parts["evaluated"] == [0, 1, 2, 3]

    arguments = ["--checkpoint", str(finished / "checkpoints" / "stage-1.pt"), "--workers", "0"]
    arguments += ["--target", str(own / "target"), "--target-format", "folder", "--labels"]
    arguments += ["--output", str(tmp_path / "val"), "--device", "cpu", "--pictures", "1"]
    settings = evaluate.parse_settings(arguments)
    trained = evaluate.load_trained(settings.checkpoint, settings.device)
    evaluate.evaluate(trained, settings)
    scores = json.loads((tmp_path / "val" / "scores.json").read_text())
    assert scores["iou"] == ious[-1]
    masks = sorted((tmp_path / "val" / "labelIds").iterdir())
    assert [path.name for path in masks] == ["field 0_labelIds.png", "field 3_labelIds.png"]
    with Image.open(masks[1]) as mask:
        assert mask.size == (44, 39)
        assert {11, 12, 300, 15, 16}.issuperset(np.unique(np.asarray(mask)).tolist())


def test_a_target_without_labels(own: Path, tmp_path: Path) -> None:
    shutil.copytree(own, tmp_path / "own")
    shutil.rmtree(tmp_path / "own" / "target" / "labels")
    with pytest.raises(DatasetError, match="--best-by target needs"):
        train.adapt(flags_of(tmp_path / "own", tmp_path / "run", "--best-by", "target"))
    report = train.adapt(flags_of(tmp_path / "own", tmp_path / "run"))
    assert (report / "panels.png").is_file()
    assert (report / "iou.txt").read_text().split()[-2:] == ["–", "–"]


@pytest.mark.usefixtures("_without_report")
def test_data_are_known_by_their_content(own: Path, finished: Path, tmp_path: Path) -> None:
    moved, output = tmp_path / "elsewhere", tmp_path / "run"
    shutil.copytree(own, moved)
    shutil.copytree(finished, output)
    train.adapt(flags_of(moved, output, "--resume"))
    (moved / "source" / "images" / "field 1.JPG").rename(moved / "source" / "images" / "x.JPG")
    (moved / "source" / "labels" / "field 1.png").rename(moved / "source" / "labels" / "x.png")
    write_pair(moved / "target", 0, (36, 44), [11, 12])
    said = r"holds a run on other data.*2 missing \(source/images/field 1.JPG.*2 new .*2 changed"
    with pytest.raises(DatasetError, match=said):
        train.adapt(flags_of(moved, output, "--resume"))
    shutil.copytree(own, tmp_path / "again")
    (tmp_path / "again" / "classes.txt").write_text("soil: 11\ncrop: 12\nweed: 300\na: 15\nb: 16")
    with pytest.raises(DatasetError, match=r"1 changed \(classes\)"):
        train.adapt(flags_of(tmp_path / "again", output, "--resume"))


@pytest.mark.usefixtures("_without_report")
def test_checkpoints_of_others_beside_those_of_a_run(
    own: Path, finished: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    shutil.copytree(finished, output)
    torch.save({"model": torch.zeros(3)}, output / "checkpoints" / "pretrained.pt")
    (output / "checkpoints" / "damaged.pt").write_bytes(b"PK")
    train.adapt(flags_of(own, output, "--resume"))
    save_checkpoint(output / "checkpoints" / "stage-1.pt", {"model": torch.zeros(3)})
    with pytest.raises(ResumeError, match=r"stage-1.pt is no checkpoint of a phase: it lacks"):
        train.adapt(flags_of(own, output, "--resume"))
    (output / "checkpoints" / "stage-1.pt").write_bytes(b"PK")
    with pytest.raises(ResumeError, match=r"stage-1.pt is not a checkpoint.*alone.*Remove it"):
        train.adapt(flags_of(own, output, "--resume"))


@pytest.mark.usefixtures("_without_report")
def test_bad_files_are_left_out_when_asked_for(own: Path, tmp_path: Path) -> None:
    shutil.copytree(own, tmp_path / "own")
    (tmp_path / "own" / "source" / "labels" / "field 1.png").write_bytes(b"")
    (tmp_path / "own" / "target" / "images" / "field 4.JPG").write_bytes(b"<html>")
    flags = flags_of(tmp_path / "own", tmp_path / "run", "--stages", "0")
    with pytest.raises(DatasetError, match=r"field 1.png is not a readable image"):
        train.adapt(flags)
    with pytest.warns(DatasetWarning) as warned:
        train.adapt([*flags, "--skip-bad"])
    said = [str(warning.message).splitlines()[0] for warning in warned]
    assert said == ["1 of 6 pairs are left out:", "1 of 5 images are left out:"]


def test_a_source_of_one_class(own: Path, tmp_path: Path) -> None:
    shutil.copytree(own, tmp_path / "own")
    (tmp_path / "own" / "classes.txt").write_text("soil: 11\nroad: 7\nroof: 8")
    with pytest.raises(DatasetError, match=r"two classes or more in the labels of .*source"):
        train.adapt(flags_of(tmp_path / "own", tmp_path / "run"))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--device", "gpu"], "--device: expected one of cpu"),
        (["--device", "cuda:99"], "--device: expected one of cpu"),
        (["--device", "meta"], "--device: expected one of cpu"),
        (["--source-format", "folder"], "own need --source and --target"),
        (["--source", ".", "--target", ".", "--source-format", "folder"], "needs --classes"),
    ],
)
def test_wrong_flags_are_said_before_any_file_is_read(
    flags: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = ["--output", str(tmp_path / "out")]
    checkpoint = tmp_path / "a.pt"
    checkpoint.touch()
    needed = ["--checkpoint", str(checkpoint), "--target", "nowhere", *output]
    calls: list[Callable[[], object]] = [lambda: train.adapt([*flags, *output])]
    if "--device" in flags:
        calls.append(lambda: evaluate.parse_settings([*flags, *needed]))
    for call in calls:
        with pytest.raises(SystemExit) as stopped:
            call()
        assert stopped.value.code == 2
        assert said in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not DATA.is_dir(), reason="the real images are not beside this repository")
def test_real_photographs_in_folders(tmp_path: Path) -> None:
    day_to_dusk = DATA / "camvid_day_to_dusk"
    for part in ("images", "labels"):
        (tmp_path / "source" / part).mkdir(parents=True)
        (tmp_path / "target" / part).mkdir(parents=True)
        for file in sorted((day_to_dusk / "source" / part).iterdir())[::20]:
            (tmp_path / "source" / part / file.name).symlink_to(file)
    for split in ("train", "val"):
        images = sorted((day_to_dusk / "target" / "leftImg8bit" / split / "dusk").iterdir())
        for image in images[::6]:
            name = image.name.replace("_leftImg8bit", "")
            (tmp_path / "target" / "images" / name).symlink_to(image)
            label = image.name.replace("leftImg8bit", "gtFine_labelIds")
            if split == "val":
                truth = day_to_dusk / "target" / "gtFine" / "val" / "dusk" / label
                (tmp_path / "target" / "labels" / name).symlink_to(truth)
    # The source shows no bus.
    text = "street: 7, 8\nbuilding: 11\nplants: 21\nsky: 23\ncar: 26\nbus: 28\npeople: 24, 25"
    (tmp_path / "classes.txt").write_text(text)
    report = train.adapt(flags_of(tmp_path, tmp_path / "run", "--max-iterations", "2"))
    table = (report / "iou.txt").read_text()
    assert "street" in table
    assert "bus" not in table
