"""The methods, each over a tiny network and images in memory: labels, losses and what is fixed."""

import copy
import importlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import adaptation
import numpy as np
import pytest
import torch
from t3a import AdjustedClassifier
from torch import Tensor, nn

from image_folders import Data, Domain
from segmentation import Objective, Options

METHODS = ["cag_uda", "cpsl", "diga", "proda", "sepico", "shot"]
SIZE = (24, 32)


class Network(nn.Module):
    """Two features for each pixel of a quarter of the resolution, and a classifier of three."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 6, 4, stride=4), nn.BatchNorm2d(6), nn.ReLU())
        self.classifier = nn.Conv2d(6, 3, 1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return features and logits."""
        features = self.encoder(images)
        return features, self.classifier(features)


def domain(images: int) -> Domain:
    """Return three classes of their own colors in blocks, and ignored corners."""
    labels = torch.randint(3, (images, 3, 4)).repeat_interleave(8, 1).repeat_interleave(8, 2)
    noise = torch.randint(40, (images, 3, *SIZE))
    colors = torch.tensor([[200, 30, 30], [30, 200, 30], [30, 30, 200]])[labels].movedim(-1, 1)
    labels[:, :4, :4] = 255
    return Domain((colors + noise).to(torch.uint8), labels.to(torch.uint8))


def test_files_find_what_they_import_when_run_as_commands(tmp_path: Path) -> None:
    folder = Path(__file__).parents[2] / "examples" / "methods"
    code = """
import pathlib, runpy, sys
paths = [sys.argv[1], *sys.path]
for file in sorted(pathlib.Path(sys.argv[1]).glob("*.py")):
    sys.path[:] = paths
    for name in ("image_folders", "light_network", "segmentation", "steps"):
        sys.modules.pop(name, None)
    runpy.run_path(str(file))
"""
    subprocess.run([sys.executable, "-c", code, folder], check=True, cwd=tmp_path)


@pytest.fixture
def data() -> Data:
    domains = [domain(count) for count in (4, 2, 4, 2)]
    source, held_out, target, evaluation = domains
    classes = {"a": [0], "b": [1], "c": [2]}
    return Data(classes, source, held_out, target, evaluation, torch.full((3,), 1 / 3))


@pytest.fixture
def options(tmp_path: Path) -> Options:
    return Options(output=tmp_path, size=SIZE, batch=2, device="cpu")


def begin_stage_of(method: str) -> Callable[[nn.Module, Data, Options], Objective]:
    begin: Callable[[nn.Module, Data, Options], Objective]
    begin = importlib.import_module(method).begin_stage
    return begin


def warm(data: Data) -> Network:
    """Return a network that knows the source."""
    network = Network()
    optimizer = torch.optim.Adam(network.parameters(), 0.02)
    for _ in range(60):
        images, labels = data.source.batch(torch.arange(4), "cpu")
        loss = nn.functional.cross_entropy(
            network(images)[1], labels[:, ::4, ::4], ignore_index=255
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.eval()


@pytest.mark.parametrize("method", METHODS)
def test_a_stage_trains_the_network_and_needs_no_target_label(
    method: str, data: Data, options: Options
) -> None:
    network = warm(data)
    # Target labels that would be an error to index by: nothing may use them.
    hidden = data._replace(
        target=Domain(data.target.images, torch.full_like(data.target.labels, 99))
    )
    torch.manual_seed(1)
    objective = begin_stage_of(method)(network, hidden, options)
    before = copy.deepcopy(network.state_dict())
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, 0.01)
    for _ in range(3):
        source, (target, _) = hidden.source.draw(2, "cpu"), hidden.target.draw(2, "cpu")
        loss = objective(network.train(), source, target)
        assert loss.isfinite()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    changed = {
        name for name, value in network.state_dict().items() if not value.equal(before[name])
    }
    assert "encoder.0.weight" in changed
    assert ("classifier.weight" in changed) == (method != "shot")


def test_shot_uses_no_source_image(data: Data, options: Options) -> None:
    network = warm(data)
    broken = Domain(data.source.images, data.source.labels).batch(torch.arange(2), "cpu")
    losses = []
    for source in (broken, (torch.full_like(broken[0], torch.nan), broken[1])):
        torch.manual_seed(0)
        objective = begin_stage_of("shot")(copy.deepcopy(network), data, options)
        losses.append(objective(network, source, data.target.batch(torch.arange(2), "cpu")[0]))
    assert torch.equal(*losses)


class Identity(nn.Module):
    """The features that it is given, and a classifier of them."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.classifier = nn.Linear(weight.shape[1], weight.shape[0])
        self.classifier.weight, self.classifier.bias = nn.Parameter(weight), nn.Parameter(bias)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return features and logits."""
        return features, self.classifier(features)


@torch.no_grad()
def test_t3a_has_the_authors_numbers(golden: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = np.load(golden / "peers" / "t3a.npz")
    monkeypatch.setattr("t3a.FILTER", int(numbers["scalars"][0]))
    adjusted = AdjustedClassifier(
        Identity(torch.tensor(numbers["weight"]), torch.tensor(numbers["bias"]))
    )
    for batch in range(4):
        _, logits = adjusted(torch.tensor(numbers[f"features_{batch}"]))
        np.testing.assert_allclose(logits, numbers[f"logits_{batch}"], rtol=2e-5, atol=1e-6)
    assert torch.bincount(adjusted.labels).max() <= int(numbers["scalars"][0])


def test_t3a_adjusts_maps_and_leaves_the_network(data: Data) -> None:
    network = warm(data)
    before = copy.deepcopy(network.state_dict())
    adjusted = AdjustedClassifier(network).eval()
    images, _ = data.target.batch(torch.arange(2), "cpu")
    with torch.no_grad():
        features, logits = adjusted(images)
        assert torch.equal(features, network(images)[0])
    assert logits.shape == (2, 3, 6, 8)
    assert all(value.equal(before[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize("name", adaptation.ROWS)
def test_a_row_of_the_comparison_trains_and_what_it_fixes_stays(
    name: str, data: Data, options: Options
) -> None:
    """A row changes the option or the labels that its name says."""
    torch.manual_seed(0)
    network = Network()
    begin, changed = adaptation.begin_row(name, options, "")
    objective = begin(copy.deepcopy(network), data, changed)
    network.train()
    loss = objective(
        network, data.source.batch(torch.arange(2), "cpu"), data.target.images[:2] / 255
    )
    loss.backward()
    assert loss.isfinite()
    gradient = network.classifier.weight.grad
    assert gradient is not None
    assert gradient.any()
    default = (options.labels, options.teacher, options.mix)
    differs = (changed.labels, changed.teacher, changed.mix) != default
    assert differs == (name in ("agreement", "rectified", "fixed teacher", "no mixing"))


def test_the_table_of_the_comparison() -> None:
    last, best = {"target": 0.5, "held-out source": 0.7}, {"target": 0.6, "held-out source": 0.6}
    runs: list[adaptation.Scores] = [
        {"control": [{"target": 0.4, "held-out source": 0.5}], "default": [best, last]},
        {"control": [{"target": 0.4, "held-out source": 0.5}], "default": [best, best]},
    ]
    name = adaptation.ROWS["default"]
    results = {"day": runs, "night": [{"control": [last]}]}
    assert f"| {name} | **55.0** ± 7.1 | – |" in adaptation.table(results, "last")
    assert f"| {name} | **60.0** ± 0.0 | – |" in adaptation.table(results, "best on target")
    chosen = adaptation.table(results, "best on held-out source")
    assert f"| {name} | **55.0** ± 7.1 | – |" in chosen
    assert f"| {name} | **+15.0** ± 7.1 | – | +15.0 |" in adaptation.table(
        results, "last", gains=True
    )
    assert len(adaptation.draw(results).axes) == 2
