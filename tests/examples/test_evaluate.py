"""Scores, averaged predictions and files of `evaluate.py`, against NumPy and by hand."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
from classes import CLASSES, NUM_CLASSES, SYNTHIA_13, SYNTHIA_16, train_ids
from engine.files import save_checkpoint
from networks.segmenter import Segmenter
from networks.small import SmallSegmenter
from numpy.typing import NDArray
from PIL import Image
from readers import cityscapes_pairs, read_labels
from synthetic import write_synthetic_pair
from torch import Tensor

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a target of three small validation images."""
    root = tmp_path_factory.mktemp("pair")
    _, folder = write_synthetic_pair(
        root, seed=0, source_images=1, target_images=1, val_images=3, height=48
    )
    return folder


def checkpoint(path: Path, source_format: str = "gta5", resize: str = "height:32") -> Path:
    torch.manual_seed(0)
    settings = {"network": "small", "resize": resize, "source_format": source_format}
    network = SmallSegmenter(NUM_CLASSES).state_dict()
    save_checkpoint(path, {"settings": settings, "network": network})
    return path


def run(target: Path, folder: Path, *flags: str, source_format: str = "gta5") -> Path:
    file = checkpoint(folder / "stage-3.pt", source_format)
    arguments = [
        *("--checkpoint", str(file), "--target", str(target), "--output", str(folder / "out")),
        *("--workers", "0", "--device", "cpu", *flags),
    ]
    settings = evaluate.parse_settings(arguments)
    trained = evaluate.load_trained(settings.checkpoint, settings.device, settings.precision)
    evaluate.evaluate(trained, settings)
    return folder / "out"


def confusion_by_hand(target: Path, labels: Path, evaluated: tuple[int, ...]) -> NDArray[np.int64]:
    counts = np.zeros((NUM_CLASSES, NUM_CLASSES), np.int64)
    for pair in cityscapes_pairs(target, "val"):
        name = pair.image.name.replace("_leftImg8bit", "_labelIds")
        with Image.open(labels / name) as image:
            assert image.mode == "L"
            predicted = train_ids(np.asarray(image))
        truth = read_labels(pair.label).numpy()
        assert predicted.shape == truth.shape
        for t, p in zip(truth.ravel(), predicted.ravel(), strict=True):
            if t in evaluated:
                counts[t, p] += 1
    return counts


@pytest.mark.parametrize("source_format", ["gta5", "synthia"])
def test_scores_are_those_of_the_written_labels(
    source_format: str, target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = run(target, tmp_path, "--labels", source_format=source_format)
    evaluated = SYNTHIA_16 if source_format == "synthia" else tuple(range(NUM_CLASSES))
    counts = confusion_by_hand(target, output / "labelIds", evaluated)
    union = counts.sum(0) + counts.sum(1) - counts.diagonal()
    occurs = counts.sum(1) > 0
    iou = counts.diagonal() / np.maximum(union, 1)
    scores = json.loads((output / "scores.json").read_text())
    assert scores["miou"] == pytest.approx(iou[occurs].mean(), abs=1e-6)
    assert scores["accuracy"] == pytest.approx(counts.diagonal().sum() / counts.sum(), abs=1e-6)
    for c, entry in enumerate(CLASSES):
        if occurs[c]:
            assert scores["iou"][entry.name] == pytest.approx(iou[c], abs=1e-6)
    if source_format == "synthia":
        thirteen = [c for c in SYNTHIA_13 if occurs[c]]
        assert scores["miou of 13 classes"] == pytest.approx(iou[thirteen].mean(), abs=1e-6)
    printed = capsys.readouterr().out
    assert (output / "iou.txt").read_text().strip() in printed
    assert ("mIoU of 13" in printed) == (source_format == "synthia")
    assert not list(output.rglob("*.tmp"))


class Scripted(Segmenter):
    """Logits that depend on place, so that a view that is not mirrored back shows."""

    feature_dim = 1

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return six classes at stride 4."""
        small = images[:, :, ::4, ::4]
        return small[:, :1], 5 * torch.cat([small, small.flip(1).cumsum(3)], dim=1)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("sizes", [[(16, 24)], [(12, 20), (16, 24), (20, 32)]])
def test_views_are_averaged(flip: bool, sizes: list[tuple[int, int]]) -> None:
    network = Scripted()
    torch.manual_seed(0)
    views = [torch.rand(1, 3, *size) for size in sizes]
    scores = evaluate.predict(network, views, (16, 24), flip=flip)
    expected, count = np.zeros((6, 16, 24)), 0
    for view in views:
        for mirrored in [False, True][: 1 + flip]:
            images = torch.from_numpy(view.numpy()[..., ::-1].copy()) if mirrored else view
            logits = network(images)[1]
            large = torch.nn.functional.interpolate(
                logits.double(), (16, 24), mode="bilinear", align_corners=False
            )[0].numpy()
            large = large[..., ::-1] if mirrored else large
            power = np.exp(large - large.max(0))
            expected += power / power.sum(0)
            count += 1
    if count == 1:
        scores = scores.softmax(dim=0)
    np.testing.assert_allclose(scores.numpy(), expected / count, atol=2e-6)


def test_flip_and_scales_are_used(target: Path, tmp_path: Path) -> None:
    results = {}
    for name, flags in {
        "plain": [],
        "scale of one": ["--scales", "1"],
        "flip": ["--flip"],
        "scales": ["--scales", "0.5", "1.5"],
    }.items():
        output = run(target, tmp_path, "--labels", *flags)
        images = [np.asarray(Image.open(p)) for p in sorted(output.glob("labelIds/*.png"))]
        results[name] = np.stack([image.ravel() for image in images])
    assert (results["plain"] == results["scale of one"]).all()
    assert (results["plain"] != results["flip"]).any()
    assert (results["plain"] != results["scales"]).any()


def test_the_test_split_has_files_and_no_scores(target: Path, tmp_path: Path) -> None:
    shutil.copytree(target / "leftImg8bit" / "val", tmp_path / "city" / "leftImg8bit" / "test")
    output = run(tmp_path / "city", tmp_path, "--split", "test", "--labels", "--pictures", "2")
    assert len(list((output / "labelIds").glob("*_labelIds.png"))) == 3
    assert (output / "pictures.png").exists()
    assert not (output / "scores.json").exists()


def test_pictures_are_drawn(target: Path, tmp_path: Path) -> None:
    output = run(target, tmp_path, "--pictures", "2")
    with Image.open(output / "pictures.png") as picture:
        assert picture.width > picture.height > 100
    assert not (output / "labelIds").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--split", "test"], "--split test has no labels to score by"),
        (["--scales", "0"], "expected numbers above 0"),
        (["--checkpoint", "nowhere.pt"], "there is no checkpoint nowhere.pt"),
    ],
)
def test_a_wrong_setting_is_named(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = checkpoint(tmp_path / "stage-3.pt")
    base = ["--checkpoint", str(file), "--target", "none", "--output", "none"]
    with pytest.raises(SystemExit):
        evaluate.parse_settings([*base, *flags])
    assert message in capsys.readouterr().err


def test_files_that_are_no_checkpoints_are_named(tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    save_checkpoint(path, {"networks": {}, "settings": {}})
    with pytest.raises(ValueError, match=r"file.pt is not a checkpoint of a phase.*stage-3.pt"):
        evaluate.load_trained(path, "cpu")
    path.write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match=r"file.pt is not a checkpoint of this example"):
        evaluate.load_trained(path, "cpu")
    settings = {"network": "small", "resize": "height:32", "source_format": "gta5"}
    save_checkpoint(path, {"settings": settings, "network": {"other.weight": torch.zeros(1)}})
    with pytest.raises(
        ValueError, match=r"(?s)does not fit its own settings.*other.weight"
    ) as raised:
        evaluate.load_trained(path, "cpu")
    assert "classifier.weight" in str(raised.value)


def test_the_command_line_names_what_is_missing(target: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(target / "leftImg8bit", bare / "leftImg8bit")
    file = checkpoint(tmp_path / "stage-3.pt")
    command = [sys.executable, evaluate.__file__, "--checkpoint", str(file), "--workers", "0"]
    finished = subprocess.run(
        [*command, "--target", str(bare), "--output", str(tmp_path / "out")],
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 1
    assert finished.stderr.strip().splitlines()[-1].startswith("error: Expected the folder")


@pytest.mark.skipif(not DATA.is_dir(), reason="the real images are not beside this repository")
def test_true_files_are_labeled_at_their_own_size(tmp_path: Path) -> None:
    output = run(DATA / "cityscapes_sample", tmp_path, "--labels", "--precision", "bfloat16")
    for path in (output / "labelIds").iterdir():
        with Image.open(path) as image:
            assert image.size == (2048, 1024)
    assert len(list((output / "labelIds").iterdir())) == 2
