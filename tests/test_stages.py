"""A stage stays fixed, and labels as its parts do by hand."""

import copy
import math
import pickle
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import anchorda
from anchorda import (
    AnchorPseudoLabeler,
    CategoryAnchors,
    ProbabilityPseudoLabeler,
    StageLabeler,
    WithinClassCovariance,
    average_views,
    combine_pseudo_labels,
    keep_correct,
    resize_labels,
)

NUM_CLASSES, DIM = 3, 5
Batches = list[tuple[Tensor, Tensor]]


class Network(nn.Module):
    """Everything that differs between training and evaluation, at half the resolution."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, DIM, 3, stride=2, padding=1), nn.BatchNorm2d(DIM), nn.Dropout(0.5)
        )
        self.classifier = nn.Conv2d(DIM, NUM_CLASSES, 1, bias=False)
        nn.init.orthogonal_(self.classifier.weight)  # So that every class is predicted somewhere.

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:  # noqa: D102
        features = self.layers(images)
        return features, self.classifier(features)


def draw_source() -> Batches:
    labels = torch.tensor([0, 1, 2, 255])
    return [(torch.randn(2, 3, 8, 6), labels[torch.randint(4, (2, 16, 12))]) for _ in range(3)]


def draw_network() -> Network:
    network = Network()
    for images, _ in draw_source():
        network(images)  # Running statistics that are not the initial ones.
    return network


def bits(module: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(module.state_dict())


def assert_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)


def by_hand(network: Network, source: Batches) -> Tensor:
    """Return the centroids of a network in evaluation mode."""
    evaluated = copy.deepcopy(network).eval()
    anchors = CategoryAnchors(NUM_CLASSES, DIM)
    with torch.no_grad():
        for images, labels in source:
            features, logits = evaluated(images)
            anchors.update(features, keep_correct(resize_labels(labels, (4, 3)), logits))
    return anchors.compute()


def begin(network: nn.Module, source: Any, **options: Any) -> StageLabeler:  # noqa: ANN401
    return StageLabeler.from_source(network, source, CategoryAnchors(NUM_CLASSES, DIM), **options)


@pytest.fixture
def network() -> Network:
    return draw_network()


@pytest.fixture
def source() -> Batches:
    return draw_source()


@pytest.fixture
def stage(network: Network, source: Batches) -> StageLabeler:
    return begin(network, source)


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 8, 6)


def test_anchors_are_those_of_the_frozen_network(network: Network, source: Batches) -> None:
    before = bits(network)
    anchors = CategoryAnchors(NUM_CLASSES, DIM)
    # A generator: the source is gone through once.
    stage = StageLabeler.from_source(network, (batch for batch in source), anchors)
    assert torch.equal(stage.centroids, by_hand(network, source))
    assert torch.equal(stage.centroids, anchors.compute())
    assert_equal(bits(network), before)
    assert network.training
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_settings_of_the_accumulator_are_the_callers(network: Network, source: Batches) -> None:
    moving = CategoryAnchors(NUM_CLASSES, DIM, momentum=1.0)
    stage = StageLabeler.from_source(network, source, moving)
    last = by_hand(network, source[-1:])
    assert torch.equal(stage.centroids[last.isfinite()], last[last.isfinite()])
    assert not torch.equal(stage.centroids, by_hand(network, source))


@pytest.mark.parametrize("rule", ["anchor", "probability", "agree", "union"])
def test_labels_are_those_of_the_parts(
    rule: str, network: Network, stage: StageLabeler, images: Tensor
) -> None:
    by_anchor, by_probability = AnchorPseudoLabeler(0.1), ProbabilityPseudoLabeler(0.5)
    stage.by_anchor, stage.by_probability = by_anchor, by_probability
    stage.rule = rule  # type: ignore[assignment]
    result = stage(images)
    with torch.no_grad():
        features, logits = copy.deepcopy(network).eval()(images)
    first, second = by_anchor(features, stage.centroids), by_probability(logits)
    expected = {
        "anchor": first.labels,
        "probability": second.labels,
        "agree": combine_pseudo_labels(first.labels, second.labels, "agree"),
        "union": combine_pseudo_labels(first.labels, second.labels, "union"),
    }
    assert len({tuple(labels.flatten().tolist()) for labels in expected.values()}) == 4
    assert torch.equal(result.labels, expected[rule])
    for actual, wanted in ((result.by_anchor, first), (result.by_probability, second)):
        assert torch.equal(actual.labels, wanted.labels)
        assert torch.equal(actual.scores, wanted.scores)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("whitened", [False, True])
def test_rectified_labels_are_a_product(
    whitened: bool, temperature: float, network: Network, source: Batches, images: Tensor
) -> None:
    covariance = WithinClassCovariance(NUM_CLASSES, DIM) if whitened else None
    stage = begin(network, source, covariance=covariance)
    stage.rule, stage.temperature = "rectify", temperature
    stage.by_probability = ProbabilityPseudoLabeler(0.5)
    with torch.no_grad():
        features, logits = stage.network(images)
    metric = stage.whitening if stage.whitening is not None else torch.eye(DIM)
    offsets = features.movedim(1, -1)[..., None, :] - stage.centroids
    squares = (offsets @ metric).double().square().sum(dim=-1).movedim(-1, 1)
    energies = squares / 2 if whitened else squares.sqrt()
    product = logits.double().softmax(dim=1) * (-energies / temperature).softmax(dim=1)
    expected = product / product.sum(dim=1, keepdim=True)
    # Measured: 3e-6, of exponentials of float32 distances of up to 30.
    torch.testing.assert_close(
        stage.probabilities(images), expected, rtol=0, atol=2e-5, check_dtype=False
    )
    labels, _, (by_probability, scores) = stage(images)
    scores_expected, classes = expected.max(dim=1)
    torch.testing.assert_close(scores, scores_expected.float(), rtol=0, atol=2e-5)
    sure = scores_expected > 0.5
    assert torch.equal(labels[sure], classes[sure])
    assert (labels[~sure] == 255).all()
    assert torch.equal(labels, by_probability)


def test_anchors_in_the_metric_of_the_covariance_are_the_discriminant(
    network: Network, source: Batches, images: Tensor
) -> None:
    covariance = WithinClassCovariance(NUM_CLASSES, DIM)
    stage = begin(network, source, covariance=covariance)
    discriminant = anchorda.linear_discriminant(by_hand(network, source), covariance.compute())
    logits = discriminant.logits(stage.network(images)[0])
    assert torch.equal(stage(images).labels, logits.argmax(dim=1))
    torch.testing.assert_close(stage.probabilities(images), logits.softmax(dim=1))


def test_soft_labels_of_other_rules(stage: StageLabeler, images: Tensor) -> None:
    features, logits = stage.network(images)
    assigned = anchorda.anchor_probabilities(features, stage.centroids)
    assert torch.equal(stage.probabilities(images), assigned)
    stage.rule = "probability"
    assert torch.equal(stage.probabilities(images), logits.softmax(dim=1))
    stage.rule = "agree"
    with pytest.raises(ValueError, match="Expected a rule with probabilities"):
        stage.probabilities(images)


def test_the_copy_follows_as_an_averaged_model_does(network: Network, stage: StageLabeler) -> None:
    average = AveragedModel(stage.network, multi_avg_fn=get_ema_multi_avg_fn(0.7), use_buffers=True)
    average.update_parameters(stage.network)  # The first is a copy.
    centroids = stage.centroids.clone()
    for _ in range(3):
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(torch.randn_like(parameter))
        network(torch.randn(2, 3, 8, 6))  # Running statistics move, too.
        stage.follow(nn.DataParallel(network), decay=0.7)
        average.update_parameters(network)
    followed, expected = bits(stage.network), bits(average.module)
    for name, value in expected.items():
        if value.is_floating_point():
            torch.testing.assert_close(followed[name], value, rtol=0, atol=1e-6)
    assert followed["layers.1.num_batches_tracked"] == network.layers[1].num_batches_tracked
    assert torch.equal(stage.centroids, centroids)
    stage.follow(network, decay=0.0)
    assert_equal(bits(stage.network), bits(network))
    assert not any(parameter.requires_grad for parameter in stage.network.parameters())


def test_a_copy_follows_no_other_network(stage: StageLabeler, network: Network) -> None:
    before = bits(stage.network)
    network.classifier = nn.Conv2d(DIM, NUM_CLASSES + 1, 1, bias=False)
    with pytest.raises(ValueError, match=r"\['classifier.weight'\] differ"):
        stage.follow(network, decay=0.9)
    with pytest.raises(ValueError, match=r"Expected `decay` in \[0.0, 1.0\]"):
        stage.follow(network, decay=2.0)
    assert_equal(bits(stage.network), before)


def test_views_are_averaged(network: Network, images: Tensor) -> None:
    network.eval()
    features, logits = average_views(scales=(1.0, 2.0))(network, images)
    views = []
    for scaled in (images, F.interpolate(images, (16, 12), mode="bilinear")):
        views.append(network(scaled))
        views.append(tuple(x.flip(3) for x in network(scaled.flip(3))))
    small = [[F.interpolate(x, (4, 3), mode="bilinear") for x in view] for view in views]
    torch.testing.assert_close(features, sum(x for x, _ in small) / 4)
    probabilities = sum(F.interpolate(z.softmax(dim=1), (4, 3), mode="bilinear") for _, z in views)
    torch.testing.assert_close(logits.softmax(dim=1), probabilities / 4)
    alone = average_views(flip=False)(network, images)
    torch.testing.assert_close(alone, (network(images)[0], network(images)[1].log_softmax(dim=1)))
    stage = StageLabeler(network, torch.randn(NUM_CLASSES, DIM), extract=average_views())
    copied = pickle.loads(pickle.dumps(stage))
    assert torch.equal(copied(images).labels, stage(images).labels)
    with pytest.raises(ValueError, match="Expected `scales` to have an entry"):
        average_views(scales=())


def test_every_pixel_is_labeled_until_minimums_are_set(stage: StageLabeler, images: Tensor) -> None:
    for pseudo in stage(images)[1:]:
        assert (pseudo.labels < NUM_CLASSES).all()


class Parent(nn.Module):
    """A module of a user's own that holds a network in training and its stage."""

    def __init__(self, network: nn.Module, stage: StageLabeler) -> None:
        super().__init__()
        self.network = network
        self.stage = stage

    def forward(self, images: Tensor) -> Tensor:  # noqa: D102
        self.stage(images)
        features: Tensor = self.network(images)[0]
        return features


def reset(module: nn.Module) -> None:
    if isinstance(module, (nn.Conv2d, nn.BatchNorm2d)):
        module.reset_parameters()


def update_statistics(parent: Parent) -> None:
    torch.optim.swa_utils.update_bn([images for images, _ in draw_source()], parent)


def decay_weights(parent: Parent) -> None:
    """An optimizer over all parameters, also of those without a gradient of their own."""
    optimizer = torch.optim.SGD(parent.parameters(), lr=1.0, weight_decay=0.5)
    for parameter in parent.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def zero_all(parent: Parent) -> None:
    with torch.no_grad():
        for tensor in (*parent.network.parameters(), *parent.parameters()):
            tensor.zero_()


def average_weights(parent: Parent) -> None:
    averaged = torch.optim.swa_utils.AveragedModel(parent, use_buffers=True)
    zero_all(parent)
    averaged.update_parameters(parent)
    parent.stage = averaged.module.get_submodule("stage")  # type: ignore[assignment]


THAWING: list[Callable[[Parent], object]] = [
    Parent.train,
    lambda parent: [module.train() for module in parent.modules()],
    lambda parent: parent.apply(nn.Module.train),  # type: ignore[arg-type]
    lambda parent: [child.train() for child in parent.stage.children()],
    lambda parent: [module.train() for _, module in parent.named_modules(remove_duplicate=False)],
    update_statistics,
    lambda parent: parent.requires_grad_(True),
    decay_weights,
    zero_all,
    lambda parent: parent.apply(reset),
    average_weights,
    lambda parent: nn.SyncBatchNorm.convert_sync_batchnorm(parent),
    lambda parent: parent.stage.network.train(),
]


@pytest.mark.parametrize("thaw", THAWING)
def test_no_parent_thaws_the_network(
    thaw: Callable[[Parent], object], network: Network, stage: StageLabeler, images: Tensor
) -> None:
    before, state = stage(images), bits(stage)
    parent = Parent(network, stage)
    thaw(parent)
    for _ in range(2):  # Dropout differs, and statistics change, from one call to the next.
        after = parent.stage(images)
        assert torch.equal(after.by_anchor.scores, before.by_anchor.scores)
        assert torch.equal(after.by_probability.scores, before.by_probability.scores)
    assert_equal(bits(parent.stage), state)
    frozen = parent.stage.network
    assert not any(module.training for module in frozen.modules())
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    assert any(isinstance(module, nn.BatchNorm2d) for module in frozen.modules())


def test_the_network_stays_when_the_original_is_trained(
    network: Network, source: Batches, stage: StageLabeler
) -> None:
    state = bits(stage)
    optimizer = torch.optim.SGD(Parent(network, stage).parameters(), lr=1.0)
    for images, _ in source:
        network(images)[1].square().mean().backward()
        optimizer.step()
    assert_equal(bits(stage), state)


def reloaded(parent: Parent) -> Parent:
    other = Parent(draw_network(), StageLabeler(draw_network(), torch.zeros(NUM_CLASSES, DIM)))
    other.load_state_dict(parent.state_dict())
    return other


def unpickled(parent: Parent) -> Parent:
    copied: Parent = pickle.loads(pickle.dumps(parent))
    return copied


@pytest.mark.parametrize(
    "move", [copy.deepcopy, unpickled, reloaded, Parent.double, Parent.share_memory, Parent.cpu]
)
def test_the_network_goes_where_its_parent_goes(
    move: Callable[[Parent], Parent], network: Network, stage: StageLabeler, images: Tensor
) -> None:
    expected = stage(images).by_probability
    moved = move(Parent(network, stage))
    weight = moved.stage.network.get_parameter("classifier.weight")
    labels, scores = moved.stage(images.to(weight.dtype)).by_probability
    assert torch.equal(labels, expected.labels)
    torch.testing.assert_close(scores, expected.scores)
    assert weight.dtype == moved.network.get_parameter("classifier.weight").dtype
    assert weight.is_shared() == (move == Parent.share_memory)
    assert not any(parameter.requires_grad for parameter in moved.stage.network.parameters())


class Remembering(Network):
    """Stores what it computes, as networks do whose features somebody needs."""

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:  # noqa: D102
        features, logits = super().forward(images)
        self.last = {"features": [features], "again": features}
        return features, logits


# Deprecated in favor of a parametrization, and still what many networks have.
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_networks_that_hold_a_part_of_a_graph_are_copied(source: Batches) -> None:
    remembering, normed = Remembering(), draw_network()
    torch.nn.utils.weight_norm(normed.classifier)
    torch.nn.utils.spectral_norm(normed.layers[0])
    for network in (remembering, normed):
        network(source[0][0])
        with pytest.raises(RuntimeError, match="deepcopy"):
            copy.deepcopy(network)
        stage = begin(network, source)
        network.eval()
        with torch.no_grad():
            features, logits = network(source[0][0])
        labels = stage(source[0][0])
        assert torch.equal(labels.by_probability.scores, logits.softmax(1).amax(1))
        assert torch.equal(
            labels.by_anchor.labels, AnchorPseudoLabeler()(features, stage.centroids).labels
        )


def test_a_network_that_cannot_be_copied_is_named(network: Network) -> None:
    network.lock = threading.Lock()  # type: ignore[assignment]
    with pytest.raises(TypeError, match=r"StageLabeler freezes a copy, but got Network, .*lock"):
        StageLabeler(network, torch.zeros(NUM_CLASSES, DIM))


def test_labelers_are_copies(network: Network, stage: StageLabeler) -> None:
    labeler = AnchorPseudoLabeler(0.5)
    held = StageLabeler(network, stage.centroids, by_anchor=labeler)
    labeler.min_margin.fill_(9.0)
    stage.centroids.fill_(9.0)
    assert held.by_anchor.min_margin == 0.5
    assert not (held.centroids == 9.0).any()


def test_calibrated_minimums_are_assigned(source: Batches, stage: StageLabeler) -> None:
    calibrator = anchorda.ScoreCalibrator(NUM_CLASSES)
    for images, _ in source:
        calibrator.update(*stage(images).by_anchor)
    stage.by_anchor = AnchorPseudoLabeler(calibrator.min_score_for_coverage(0.5))
    coverage = torch.stack([stage(images).labels for images, _ in source]) < NUM_CLASSES
    assert 0.5 <= coverage.double().mean().item() < 0.7


def test_state_survives_a_file(stage: StageLabeler, images: Tensor, tmp_path: Path) -> None:
    stage.by_anchor = AnchorPseudoLabeler(torch.tensor([0.1, 0.2, math.inf]))
    stage.by_probability = ProbabilityPseudoLabeler(0.4)
    torch.save(stage.state_dict(), tmp_path / "stage.pt")
    # Built from what is known without the source; the minimums' shapes are the file's.
    restored = StageLabeler(Network(), torch.full((NUM_CLASSES, DIM), torch.nan))
    restored.load_state_dict(torch.load(tmp_path / "stage.pt", weights_only=True))
    for actual, wanted in zip(restored(images)[1:], stage(images)[1:], strict=True):
        assert torch.equal(actual.labels, wanted.labels)
        assert torch.equal(actual.scores, wanted.scores)
    assert_equal(bits(restored), bits(stage))


def test_a_metric_survives_a_file(network: Network, source: Batches) -> None:
    stage = begin(network, source, covariance=WithinClassCovariance(NUM_CLASSES, DIM))
    restored = StageLabeler(Network(), torch.zeros(NUM_CLASSES, DIM))
    without = bits(restored)
    restored.load_state_dict(stage.state_dict())
    assert_equal(bits(restored), bits(stage))
    halved = copy.deepcopy(restored).half().whitening
    assert halved is not None
    assert halved.dtype == torch.float32
    restored.load_state_dict(without)
    assert restored.whitening is None


def test_a_cast_reaches_the_network_and_not_the_state(stage: StageLabeler) -> None:
    centroids = stage.centroids.clone()
    nn.ModuleList([stage]).half()
    assert stage.network.get_parameter("classifier.weight").dtype == torch.float16
    assert torch.equal(stage.centroids, centroids)
    assert stage(torch.randn(1, 3, 8, 6).half()).by_anchor.scores.dtype == torch.float32
    stage.to("meta")
    assert all(value.is_meta for value in stage.state_dict().values())


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_wrapped_networks_are_unwrapped(network: Network, source: Batches) -> None:
    expected = by_hand(network, source)
    parallel = nn.parallel.DistributedDataParallel(network)
    compiled = torch.compile(network, backend="eager")
    for wrapped in (parallel, compiled, torch.compile(parallel, backend="eager")):
        assert isinstance(wrapped, nn.Module)
        stage = begin(wrapped, source)
        assert type(stage.network) is Network
        assert torch.equal(stage.centroids, expected)
    network.compile(backend="eager")
    assert torch.equal(begin(network, source).centroids, expected)


def test_other_networks_through_a_function(network: Network, source: Batches) -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside = network

        def forward(self, images: Tensor) -> dict[str, Tensor]:
            features, logits = self.inside(images)
            return {"logits": logits, "features": features}

    def extract(module: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
        outputs = module(images)
        return outputs["features"], outputs["logits"]

    stage = begin(Wrapped(), source, extract=extract)
    assert torch.equal(stage.centroids, by_hand(network, source))
    assert stage(torch.randn(1, 3, 8, 6)).labels.shape == (1, 4, 3)


def test_labeling_traces_whole(stage: StageLabeler, images: Tensor) -> None:
    expected = stage(images)
    compiled = torch.compile(stage, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(images).labels, expected.labels)
    torch._dynamo.reset()


def test_wrong_arguments_are_named(network: Network, stage: StageLabeler, source: Batches) -> None:
    with pytest.raises(ValueError, match=r"Expected `centroids` of shape \(C, D\)"):
        StageLabeler(network, torch.zeros(DIM))
    with pytest.raises(ValueError, match="Expected `rule` to be one of 'anchor', 'probability'"):
        StageLabeler(network, stage.centroids, rule="both")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="Expected `extract` to be a function"):
        StageLabeler(network, stage.centroids, extract=nn.Identity())
    with pytest.raises(ValueError, match="Set feature_dim=5"):
        StageLabeler.from_source(network, source, CategoryAnchors(NUM_CLASSES, DIM + 1))
    with pytest.raises(ValueError, match=r"Expected `logits` of shape .* = \(2, 4, 4, 3\)"):
        StageLabeler.from_source(network, source, CategoryAnchors(NUM_CLASSES + 1, DIM))
    full = CategoryAnchors(NUM_CLASSES, DIM)
    full.update(torch.zeros(1, DIM), torch.tensor([0]))
    with pytest.raises(ValueError, match=r"seen nothing yet, .* Call anchors.reset\(\)"):
        StageLabeler.from_source(network, source, full)


def test_labelers_that_do_not_fit_are_named_when_they_are_used(stage: StageLabeler) -> None:
    fitting, images = stage.by_anchor, torch.randn(1, 3, 8, 6)
    stage.by_anchor = AnchorPseudoLabeler(ignore_index=250)
    with pytest.raises(ValueError, match="of one ignore_index, but got 250 and 255"):
        stage(images)
    stage.by_anchor = AnchorPseudoLabeler(torch.zeros(NUM_CLASSES + 1))
    with pytest.raises(ValueError, match=r"`min_margin` to be one number or of shape \(C,\)"):
        stage(images)
    stage.by_anchor = fitting
    stage.by_probability = ProbabilityPseudoLabeler(torch.zeros(NUM_CLASSES - 1))
    with pytest.raises(ValueError, match="`min_probability` to be one number or of shape"):
        stage(images)
    with pytest.raises(ValueError, match="`min_probability` to be one number or of shape"):
        StageLabeler(stage.network, stage.centroids, by_probability=stage.by_probability)


def test_outputs_that_do_not_fit_are_named(network: Network, stage: StageLabeler) -> None:
    def upsampled(module: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
        features, logits = module(images)
        return features, nn.functional.interpolate(logits, scale_factor=2)

    stage = StageLabeler(network, stage.centroids, extract=upsampled)
    with pytest.raises(ValueError, match=r"but got \(1, 3, 8, 6\). Let `extract` return"):
        stage(torch.randn(1, 3, 8, 6))


def test_margins_out_of_reach_are_warned_of(network: Network, stage: StageLabeler) -> None:
    with pytest.warns(UserWarning, match="No pixel can exceed the minimum margin"):
        StageLabeler(network, stage.centroids, by_anchor=AnchorPseudoLabeler(1e3))
    StageLabeler(network, stage.centroids, by_anchor=AnchorPseudoLabeler(1.0, relative=True))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (None, "at least one batch, but got none"),
        (
            torch.full((1, 8, 6), 255),
            "labels in .0, 3., but got none in 1 batches: all are ignored",
        ),
        (torch.full((1, 8, 6), 7, dtype=torch.uint8), "Map the ids of the label files"),
        (torch.zeros(1, 8, 6, dtype=torch.int64), "classifies right, but got none among 12"),
    ],
)
def test_a_source_that_gives_no_anchor_is_an_error(labels: Tensor | None, message: str) -> None:
    class Wrong(nn.Module):
        def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
            features = torch.zeros(1, DIM, 4, 3)
            return features, torch.tensor([0.0, 1.0, 0.0]).reshape(1, 3, 1, 1).expand(1, 3, 4, 3)

    source = iter([] if labels is None else [(torch.randn(1, 3, 8, 6), labels)])
    with pytest.raises(ValueError, match=message):
        begin(Wrong(), source)


LABELS = torch.zeros(2, 16, 12, dtype=torch.int64)
IMAGES = torch.zeros(2, 3, 8, 6)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"image": IMAGES, "label": LABELS}, r"but got a dict with 'image', 'label'. Pass"),
        ((IMAGES, LABELS, [8, 6], ["a"]), "tuple of Tensor, Tensor, list, list. Pass .*, \\*_ in"),
        ((IMAGES,), "but got a tuple of Tensor"),
        (IMAGES, r"but got a Tensor of shape \(2, 3, 8, 6\)"),
        ((IMAGES, LABELS.numpy()), r"got numpy.ndarray. Convert it with torch.from_numpy\(labels"),
        ((IMAGES, LABELS[:, None]), r"labels.squeeze\(1\)"),
        ((IMAGES, LABELS[..., None]), r"labels.squeeze\(-1\)"),
        (([IMAGES], LABELS), "images that are moved to a device .*, but got a list of Tensor"),
        (None, "iterable of pairs"),
    ],
)
def test_batches_of_other_codes_are_named(network: Network, batch: object, message: str) -> None:
    batches: Any = [batch] if batch is not None else 3
    with pytest.raises((TypeError, ValueError), match=message):
        begin(network, batches)


@pytest.mark.parametrize(
    ("select", "message"),
    [
        (lambda features, logits: {"out": logits, "aux": logits}, "a dict with 'out', 'aux'. Pass"),
        (lambda features, logits: logits, r"a Tensor of shape \(2, 3, 4, 3\). Pass `extract`"),
        (lambda features, logits: ([features], logits), "a tuple of list, Tensor"),
        (lambda features, logits: (features, logits, logits), "a tuple of Tensor, Tensor, Tensor"),
        (lambda features, logits: None, "a NoneType"),
        (lambda features, logits: (logits, features), "first the features, then the logits"),
        (lambda features, logits: (features, logits[:, :1]), "make|at least two classes"),
        (lambda features, logits: (features.long(), logits), r"features.float\(\)"),
    ],
)
def test_outputs_of_other_networks_are_named(
    network: Network, stage: StageLabeler, select: Callable[[Tensor, Tensor], Any], message: str
) -> None:
    other = StageLabeler(
        network, stage.centroids, extract=lambda module, images: select(*module(images))
    )
    with pytest.raises((TypeError, ValueError), match=message):
        other(IMAGES)
