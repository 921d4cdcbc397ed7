"""Own images: from folders to masks, resumed runs, and files and classes that do not fit."""

import copy
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

pytest.importorskip("kornia", reason="the examples extra is not installed")

import image_folders
import light_network
import segmentation
from image_folders import Data, DataError, Domain, read_classes, read_domain
from segmentation import Options

CLASSES = "road: 7\nsidewalk: 8\nbuilding: 11, 12\nsky: 23\ncar: 26\n"
IDS = (0, 7, 8, 11, 12, 23, 26)


def write(
    folder: Path,
    stem: str,
    ids: Sequence[int] = IDS,
    *,
    size: tuple[int, int] = (30, 40),
    image: str = "jpg",
    labeled: bool = True,
) -> NDArray[np.uint8]:
    """Return an image whose blocks of color are its classes, and its label."""
    for kind in ("images", "labels"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(sum(map(ord, stem)))
    blocks = rng.choice(ids, (3, 4)).astype(np.uint8)
    labels = np.kron(blocks, np.ones((size[0] // 3, size[1] // 4), np.uint8))
    pixels = np.stack([labels * 9, labels * 5, 255 - labels * 7], -1)
    Image.fromarray(pixels).save(folder / "images" / f"{stem}.{image}")
    if labeled:
        Image.fromarray(labels).save(folder / "labels" / f"{stem}.png")
    return labels


@pytest.fixture
def options(tmp_path: Path) -> Options:
    """Return the options of a short run: five classes, jpg beside png, several sizes."""
    for index in range(10):
        write(tmp_path / "source", f"s{index}")
    for index in range(30):
        size = (30 + 3 * index, 40 + 4 * index)
        write(tmp_path / "target", f"t{index}", size=size, labeled=index >= 26, image="JPG")
    (tmp_path / "classes.txt").write_text(CLASSES)
    return Options(
        output=tmp_path / "out",
        source=tmp_path / "source",
        target=tmp_path / "target",
        classes=tmp_path / "classes.txt",
        size=(32, 48),
        warmup_iterations=4,
        stages=2,
        stage_iterations=2,
        batch=2,
        threads=1,
        device="cpu",
    )


def open_data(options: Options) -> Data:
    assert options.source is not None
    assert options.target is not None
    assert options.classes is not None
    return image_folders.open_data(options.source, options.target, options.classes, options.size)


def arguments(options: Options) -> list[str]:
    return [
        *("--output", str(options.output), "--source", str(options.source)),
        *("--target", str(options.target), "--classes", str(options.classes)),
        *("--size", "32", "48", "--warmup-iterations", "4", "--stages", "2"),
        *("--stage-iterations", "2", "--batch", "2", "--threads", "1", "--device", "cpu"),
    ]


def weights(path: Path) -> dict[str, Tensor]:
    saved: dict[str, dict[str, Tensor]] = torch.load(path, weights_only=True)
    return saved["weights"]


def test_runs_from_folders_to_masks_and_resumes(
    options: Options, capsys: pytest.CaptureFixture[str]
) -> None:
    segmentation.main([*arguments(options), "--control"])
    said = capsys.readouterr().out
    assert "source: 10 images" in said
    assert "target: 26 images" in said
    assert "evaluation: 4 images" in said
    assert "% ignored, ids [0]" in said
    table = [line for line in said.splitlines() if line.startswith("|")]
    assert table[0] == "| IoU (%) | source only | control | adapted | change |"
    names = [row.split(" | ")[0] for row in table[2:]]
    assert names == ["| road", "| sidewalk", "| building", "| sky", "| car", "| mean"]
    scores = json.loads((options.output / "scores.json").read_text())
    with Image.open(options.output / "pictures.png") as picture:
        assert picture.size[0] > 1000

    # An interrupted run goes on after its last phase, and ends where the whole one did.
    whole = weights(options.output / "network.pt")
    for name in ("phases/adapted-2.pt", "network.pt", "scores.json"):
        (options.output / name).unlink()
    stamp = (options.output / "phases" / "source only-0.pt").stat().st_mtime_ns
    segmentation.main([*arguments(options), "--control", "--resume"])
    resumed = weights(options.output / "network.pt")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert json.loads((options.output / "scores.json").read_text()) == scores
    assert (options.output / "phases" / "source only-0.pt").stat().st_mtime_ns == stamp

    with pytest.raises(SystemExit, match=r"trained with \{'rate': 0.001\}"):
        segmentation.main([*arguments(options), "--resume", "--rate", "0.1"])

    write(options.output / "new", "a", size=(60, 80), image="bmp")
    folder = str(options.output / "new" / "images")
    segmentation.main(["--output", str(options.output), "--predict", folder, "--device", "cpu"])
    with Image.open(options.output / "masks" / "a.png") as mask:
        assert mask.size == (80, 60)
        assert set(np.unique(np.asarray(mask))) <= {7, 8, 11, 23, 26}  # the first id of each class


def test_all_that_cannot_be_used_is_named_before_training(options: Options, tmp_path: Path) -> None:
    source = tmp_path / "source"
    write(source, "color")
    Image.new("RGB", (40, 30), (1, 2, 3)).save(source / "labels" / "color.png")
    write(source, "small")
    Image.new("L", (20, 30)).save(source / "labels" / "small.png")
    (source / "images" / "torn.png").write_bytes(b"no image")
    (source / "labels" / "torn.png").write_bytes(b"no image")
    write(source, "lossy")
    (source / "labels" / "lossy.png").rename(source / "labels" / "lossy.jpg")
    with pytest.raises(DataError) as caught:
        open_data(options)
    problems = {line.split(": ")[0].strip(): line for line in str(caught.value).splitlines()[1:]}
    assert [Path(name).stem for name in problems] == ["color", "lossy", "small", "torn"]
    for stem, said in {"color": "color image", "lossy": "JPEG", "small": "20×30"}.items():
        assert said in problems[str(source / "images" / f"{stem}.jpg")]
    with pytest.raises(SystemExit, match="torn"):
        segmentation.main(arguments(options))


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("road\n", "two classes or more"),
        ("road: 1\ncar: 1\n", "each id once"),
        ("road: one\ncar: 2\n", "but got 'road: one'"),
        ("a: 70000\nb: 2\n", "each id once"),
        ("sand: 90\nsnow: 91\n", "fewer than two of the classes"),  # ids of another convention
        ("sand: 90\nroad: 7\n", "fewer than two of the classes"),
    ],
)
def test_classes_that_teach_nothing_are_refused(options: Options, text: str, match: str) -> None:
    assert options.classes is not None
    options.classes.write_text(text)
    with pytest.raises(DataError, match=match):
        open_data(options)


def test_classes_by_line_number_or_ids(tmp_path: Path) -> None:
    path = tmp_path / "classes.txt"
    path.write_text("\ufeffroad\n\nfar: away: 7, 8\nsky\n", "utf-8")
    assert read_classes(path) == {"road": [0], "far: away": [7, 8], "sky": [3]}


def test_label_files_of_every_kind_give_the_same_labels(tmp_path: Path) -> None:
    folder = tmp_path / "kinds"
    ids = write(folder, "gray", image="png")
    for kind in ("palette", "wide", "three"):
        write(folder, kind, image="png")
        gray = Image.fromarray(ids)
        if kind == "palette":
            gray.putpalette(list(range(256)) * 3)
        label = {"wide": Image.fromarray(ids.astype(np.uint16)), "three": gray.convert("RGB")}
        label.get(kind, gray).save(folder / "labels" / f"{kind}.png")
    pairs = [(path, folder / "labels" / path.name) for path in (folder / "images").iterdir()]
    classes = {"low": [7, 8], "high": [11, 12, 23, 26]}
    labels = read_domain("kinds", pairs, classes, (30, 40)).labels
    expected = np.select([np.isin(ids, [7, 8]), ids > 8], [0, 1], 255)
    assert all(np.array_equal(map_, expected) for map_ in labels)


def test_classes_on_one_side_and_labels_of_a_whole_target(
    options: Options, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A class that the source lacks is said and not scored; one that the target lacks has none."""
    for index in range(6):
        write(tmp_path / "whole", f"w{index}", ids=(7, 8, 26, 40))
    assert options.classes is not None
    options.classes.write_text(CLASSES + "moon: 40\n")
    data = open_data(dataclasses.replace(options, target=tmp_path / "whole"))
    said = capsys.readouterr().out
    assert "not shown: moon" in said
    assert "evaluation: 2 images" in said
    assert (data.target.labels == 255).all()
    assert len(data.target.images) == 4
    assert 5 not in data.evaluation.labels


def test_one_stem_twice_and_photographs_that_lie_on_their_side(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    write(tmp_path, "a", size=(60, 80))
    turned = Image.Exif()
    turned[0x0112] = 6  # orientation: a quarter turn
    with Image.open(folder / "a.jpg") as file:
        file.save(folder / "a.jpg", exif=turned)
    assert image_folders.read_image(folder / "a.jpg").size == (60, 80)
    write(tmp_path, "a", image="png")
    with pytest.raises(DataError, match=r"\['a.jpg'\] have another"):
        image_folders.list_images(folder)


def test_one_image_each_and_no_labels_in_the_target(
    options: Options, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "a", "one")
    write(tmp_path / "b", "one", labeled=False)
    few = dataclasses.replace(options, source=tmp_path / "a", target=tmp_path / "b", stages=1)
    few = dataclasses.replace(few, warmup_iterations=1, stage_iterations=1)
    segmentation.run(few, open_data(few))
    assert "|" not in capsys.readouterr().out
    assert (options.output / "pictures.png").exists()


def test_unlabeled_source_and_empty_folders(options: Options, tmp_path: Path) -> None:
    write(tmp_path / "bare", "a", labeled=False)
    (tmp_path / "empty" / "images").mkdir(parents=True)
    for folder, match in (("bare", "with the names"), ("empty", "Expected images in")):
        with pytest.raises(DataError, match=match):
            open_data(dataclasses.replace(options, source=tmp_path / folder))


def test_predictions_have_the_size_that_is_asked_for(options: Options) -> None:
    torch.manual_seed(0)
    data = open_data(options)
    network = light_network.build_network("", 5, "cpu").eval()
    images, _ = data.target.batch(torch.arange(4), options.device)
    with torch.no_grad():
        teacher = network(images)[1]
    assert teacher.shape == (4, 5, 8, 12)
    assert (segmentation.predict(network, images, (32, 48)) < 5).all()


def test_labels_follow_the_network_and_weigh_as_much_as_their_probability(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segmentation, "DECAY", 0.8)
    data, network = open_data(options), light_network.build_network("", 5, "cpu")
    target = data.target.images[:2] / 255
    for teacher in ("average", "stage"):
        changed = dataclasses.replace(options, teacher=teacher)
        label = segmentation.label_all(network, data, changed)
        other = copy.deepcopy(network)
        torch.nn.init.normal_(other.get_submodule("classifier").get_parameter("weight"), std=20.0)
        for _ in range(18 if teacher == "average" else 1):  # 0.8¹⁸ is 2 % of the old weights
            labels, weights = label(other, target)
        followed = other if teacher == "average" else network
        with torch.no_grad():
            _, logits = segmentation.at_full_size(followed.eval(), target)
        scores, predicted = logits.softmax(dim=1).max(dim=1)
        assert (labels == predicted).double().mean() > 0.999
        error = (weights - scores).abs().mean()  # measured: 1e-4 of the average, 0 of the copy
        assert error < (3e-4 if teacher == "average" else 1e-6)
        assert (scores.mean() > 0.9) == (teacher == "average")


@pytest.mark.parametrize("by", ["last", "source", "information", "agreement"])
def test_the_best_network_is_chosen_without_labels_of_the_target(by: str, options: Options) -> None:
    torch.manual_seed(0)
    data = open_data(options)
    data = data._replace(evaluation=Domain(data.evaluation.images[:0], data.evaluation.labels[:0]))
    networks = [light_network.build_network("", 5, "cpu") for _ in range(3)]
    best = segmentation.best(iter(networks), 3, by, data, options)
    if by == "last":
        assert best is networks[-1]
        return
    scores = [segmentation.score(network, by, data, options) for network in networks]
    assert len(set(scores)) == 3
    expected = networks[scores.index(max(scores))].state_dict()
    assert all(torch.equal(value, expected[k]) for k, value in best.state_dict().items())


def test_mixing_pastes_source_pixels_with_their_labels() -> None:
    source = torch.full((3, 3, 8, 8), 0.25), torch.arange(8).expand(3, 8, 8) % 4
    target = torch.full((3, 3, 8, 8), 0.75), torch.full((3, 8, 8), 9)
    images, labels = segmentation.mix(source, target, classes=2)
    pasted = images[:, 0] == 0.25
    assert torch.equal(labels, torch.where(pasted, source[1], target[1]))
    for image, label in zip(pasted, source[1], strict=True):
        assert 1 <= len(label[image].unique()) <= 2


def test_crops_hold_no_label_that_was_not_there() -> None:
    labels = torch.tensor([0, 3, 255]).repeat_interleave(16).expand(2, 36, 48)
    images = labels[:, None].expand(2, 3, 36, 48) / 255
    crops, cropped = segmentation.crop(images, labels)
    assert crops.shape == (2, 3, 27, 36)
    assert set(cropped.unique().tolist()) <= {0, 3, 255}
    assert ((crops[:, 0] * 255 - cropped).abs() < 1).double().mean() > 0.8  # moved alike
