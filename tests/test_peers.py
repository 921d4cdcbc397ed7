"""Numbers of other papers' code, reproduced by public blocks; see golden/peers/README.md.

Everything is compared in float32 and in float64. What belongs to one method alone (a memory bank, a
queue of supports, rare-class sampling, a moving average) is written here in plain torch, around the
public blocks; the comments say so.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

import anchorda

# Relative to the largest entry of an array. Measured: 7.3e-7 in float32, 4.6e-7 in float64.
TOLERANCE = 2e-5
Numbers = dict[str, Any]
DTYPES = [torch.float32, torch.float64]


def numbers_of(folder: Path, name: str) -> Numbers:
    """Return arrays as tensors, and scalars as floats, of one file."""
    with np.load(folder / "peers" / f"{name}.npz") as file:
        arrays = dict(file)
    scalars = dict(zip(arrays.pop("scalar_names").tolist(), arrays.pop("scalars"), strict=True))
    for key, stored in arrays.pop("same_as", np.empty((0, 2), str)).tolist():
        arrays[key] = arrays[stored]
    return {key: torch.from_numpy(value) for key, value in arrays.items()} | {
        key: float(value) for key, value in scalars.items()
    }


class Reader:
    """Numbers of a file, floating-point tensors in one dtype."""

    def __init__(self, numbers: Numbers, dtype: torch.dtype) -> None:
        self.numbers, self.dtype = numbers, dtype

    def __call__(self, key: str) -> Any:  # noqa: ANN401 — a tensor or a float
        """Return a number."""
        value = self.numbers[key]
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.to(self.dtype)
        return value

    def leaf(self, key: str) -> Tensor:
        """Return a copy that requires a gradient."""
        leaf: Tensor = self(key).clone().requires_grad_()
        return leaf


@pytest.fixture(params=DTYPES, ids=["float32", "float64"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def read(golden: Path, dtype: torch.dtype) -> Any:  # noqa: ANN401
    return lambda name: Reader(numbers_of(golden, name), dtype)


def close(
    actual: Tensor | npt.NDArray[Any] | float, expected: Tensor | float, atol: float = 0.0
) -> None:
    a = torch.as_tensor(actual).detach().double().numpy()
    e = torch.as_tensor(expected).double().numpy()
    assert a.shape == e.shape
    np.testing.assert_allclose(a, e, rtol=0, atol=max(TOLERANCE * np.abs(e).max(), atol))


def close_with_gradient(loss: Tensor, leaf: Tensor, expected: float, gradient: Tensor) -> None:
    close(loss, expected)
    (actual,) = torch.autograd.grad(loss, leaf)
    close(actual, gradient)


def seen_rows(prototypes: Tensor, seen: Tensor) -> Tensor:
    """Return rows with NaN instead of 0 for a class that was never seen."""
    return torch.where(seen[:, None], prototypes, math.nan)


# ------------------------------------------------------------------------------------------ ProDA


def test_proda_mean_vectors(read: Any) -> None:  # noqa: ANN401
    n = read("proda")
    features, logits = n("mean_vectors.features"), n("mean_vectors.logits")
    predicted = logits.argmax(dim=1)
    sure = anchorda.ProbabilityPseudoLabeler(0.8)(logits).labels
    correct = anchorda.keep_correct(n("mean_vectors.labels"), logits)
    # The minimum of 10 pixels is of the predicted ones, before others are left out; with labels, of
    # those where both agree.
    _, enough = anchorda.image_centroids(features, predicted, 5, min_pixels=10)
    for name, labels in (("argmax", predicted), ("threshold", sure), ("labels", correct)):
        if name == "labels":
            _, enough = anchorda.image_centroids(features, correct, 5, min_pixels=10)
        means, classes = anchorda.image_centroids(features, labels, 5)
        used = (enough != 255) & (classes != 255)
        close(means.mT[used], n(f"mean_vectors.{name}.vectors"))
        assert torch.equal(classes[used], n(f"mean_vectors.{name}.classes"))


def test_proda_update(read: Any) -> None:  # noqa: ANN401
    n = read("proda")
    vectors, classes = n("update.vectors"), n("update.classes")
    used = vectors.sum(dim=1) != 0  # their code skips a vector whose sum is 0
    mean = anchorda.CategoryAnchors(5, 7)
    for i in range(20):
        if used[i]:
            mean.update(vectors[i : i + 1], classes[i : i + 1])
    close(mean.means, n("update.mean_after_20"))
    moving = anchorda.CategoryAnchors(5, 7, momentum=n("update.momentum"))
    moving.load_state_dict(mean.state_dict())
    for i in range(20, 40):
        if used[i]:
            moving.update(vectors[i : i + 1], classes[i : i + 1])
    close(moving.means, n("update.moving_after_40"))
    # A class that was never seen is 0 there, and NaN here.
    unseen = (n("update.moving_after_40") == 0).all(dim=1)
    assert torch.equal(moving.compute().isnan().all(dim=1), unseen)


def test_proda_rectify(read: Any) -> None:  # noqa: ANN401
    n = read("proda")
    temperature = 1 / n("rectify.temperature")  # theirs multiplies
    weights = anchorda.anchor_probabilities(
        n("rectify.features"), n("rectify.prototypes"), temperature=temperature
    )
    close(weights, n("rectify.weights"))
    rectified = anchorda.rectify(n("rectify.probabilities"), weights)
    close(rectified, n("rectify.rectified"))
    labeler = anchorda.ProbabilityPseudoLabeler(n("rectify.min_probability"), ignore_index=250)
    assert torch.equal(labeler(rectified.log()).labels, n("rectify.labels"))


def test_proda_symmetric_cross_entropy(read: Any) -> None:  # noqa: ANN401
    n = read("proda")
    labels, alpha, beta = n("symmetric.labels"), n("symmetric.alpha"), n("symmetric.beta")
    logits = n.leaf("symmetric.logits")
    total = anchorda.symmetric_cross_entropy(logits, labels, alpha=alpha, beta=beta)
    close_with_gradient(total, logits, n("symmetric.total"), n("symmetric.grad_total"))
    reverse = anchorda.symmetric_cross_entropy(logits, labels, alpha=0.0, beta=1.0)
    close_with_gradient(reverse, logits, n("symmetric.reverse"), n("symmetric.grad_reverse"))
    close(anchorda.discriminative_loss(logits, labels), n("symmetric.cross_entropy"))


def test_proda_regularizers(read: Any) -> None:  # noqa: ANN401
    n = read("proda")
    logits = n.leaf("symmetric.logits")
    # Every pixel, whatever its label: cross-entropy with nothing but smoothing.
    anything = torch.zeros_like(n("symmetric.labels"))
    spread = anchorda.discriminative_loss(logits, anything, label_smoothing=1.0)
    close_with_gradient(spread, logits, n("regularizer.mrkld"), n("regularizer.mrkld_grad"))
    # Plain torch: one method's negative entropy.
    entropy = (logits.softmax(dim=1) * logits.log_softmax(dim=1)).sum(dim=1).mean()
    close_with_gradient(entropy, logits, n("regularizer.mrent"), n("regularizer.mrent_grad"))


def test_proda_consistency(read: Any) -> None:  # noqa: ANN401
    n = read("proda")
    distances, temperature = n("consistency.teacher_distances_250_is_padding"), 1.0
    padding = distances == 250
    teacher = torch.where(padding, math.nan, (-distances / temperature).softmax(dim=1))
    features = n.leaf("consistency.student_features")
    loss = anchorda.anchor_consistency_loss(features, teacher, n("rectify.prototypes"))
    # Their mean is over pixels and classes.
    close_with_gradient(loss / 5, features, n("consistency.loss"), n("consistency.grad"))


# ------------------------------------------------------------------------------------------- CPSL


def test_cpsl_sinkhorn(read: Any) -> None:  # noqa: ANN401
    n = read("cpsl")
    assignments = anchorda.sinkhorn_assignments(
        n("sinkhorn.scores"),
        shares=n("sinkhorn.class_shares"),
        epsilon=n("sinkhorn.epsilon"),
        iterations=int(n("sinkhorn.iterations")),
    )
    close(assignments, n("sinkhorn.assignments"))


def test_cpsl_swapped_prediction(read: Any) -> None:  # noqa: ANN401
    n = read("cpsl")
    features, q = n.leaf("swapped.features"), n("swapped.assignments")
    prototypes = normalize(n("swapped.prototypes"), dim=1)
    loss = anchorda.anchor_consistency_loss(
        features, q, prototypes, similarity="dot", temperature=n("swapped.temperature")
    )
    # A divergence is the cross-entropy less the entropy of its targets, which is a constant.
    loss = loss - torch.xlogy(q, q).sum(dim=1).mean()
    close_with_gradient(loss, features, n("swapped.loss"), n("swapped.grad"))


def test_cpsl_contrast_to_a_bank(read: Any) -> None:  # noqa: ANN401
    n = read("cpsl")
    # Plain torch: the bank is one method's.
    features, labels = n.leaf("contrastive.features"), n("contrastive.labels").flatten()
    bank_labels = n("contrastive.bank_labels").flatten()
    scores = features @ n("contrastive.bank").T / n("contrastive.temperature")
    positive = labels[:, None] == bank_labels
    negatives = scores.masked_fill(positive, -math.inf).logsumexp(dim=1, keepdim=True)
    logarithms = scores - torch.logaddexp(scores, negatives)
    sums = torch.where(positive, logarithms, 0.0).sum(dim=1)
    loss = -(sums / (positive.sum(dim=1) + 1e-5)).mean()
    close_with_gradient(loss, features, n("contrastive.loss"), n("contrastive.grad"))


# ----------------------------------------------------------------------------------------- SePiCo


def moments_after(n: Reader, prefix: str, steps: int) -> list[anchorda.ClassVariances]:
    """Return the estimator after each of its updates."""
    states, state = [], anchorda.ClassVariances(5, 7)
    for t in range(steps):
        state.update(n(f"{prefix}features_{t}"), n(f"{prefix}labels_{t}"))
        following = anchorda.ClassVariances(5, 7)
        following.merge(state)
        states.append(following)
    return states


def close_moments(
    state: anchorda.ClassVariances, means: Tensor, variances: Tensor, counts: Tensor
) -> None:
    """Equal for seen classes; an unseen class is 0 there and NaN here."""
    seen = counts > 0
    assert torch.equal(state.counts.double(), counts.double())
    moments = state.compute()
    close(moments.means[seen], means[seen])
    close(moments.variances[seen], variances[seen])
    assert moments.means[~seen].isnan().all()
    assert not means[~seen].any()


def test_sepico_estimator(read: Any) -> None:  # noqa: ANN401
    n = read("sepico")
    state = moments_after(n, "estimator.", 6)[-1]
    close_moments(state, n("estimator.means"), n("estimator.variances"), n("estimator.counts"))
    n = read("sepico_full")
    for t, state in enumerate(moments_after(n, "update_proto.", 6)):
        of_step = [n(f"update_proto.{key}")[t] for key in ("Ave", "CoVariance", "Amount")]
        close_moments(state, *of_step)
    before = state.state_dict()
    state.update(torch.ones(0, 7), torch.ones(0, dtype=torch.int64))
    for name, value in state.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    assert n("update_proto.empty_unchanged")


def test_sepico_memory_bank(read: Any) -> None:  # noqa: ANN401
    n = read("sepico_full")
    # Plain torch: a queue of class means, which starts with a vector of 0.
    bank = [[torch.zeros(7, dtype=n.dtype)] for _ in range(5)]
    for t in range(6):
        labels = n(f"update_proto.labels_{t}")
        sums, counts = anchorda.class_sums(n(f"update_proto.features_{t}"), labels, 5)
        for c in range(5):
            if counts[c] > 0:
                bank[c].append((sums[c] / counts[c]).to(n.dtype))
                bank[c] = bank[c][-int(n("update_proto.memory_length")) :]
    assert [len(queue) for queue in bank] == n("update_proto.bank_lengths").tolist()
    close(torch.stack([vector for queue in bank for vector in queue]), n("update_proto.bank"))


@pytest.mark.parametrize(
    ("name", "source", "output", "ratio"),
    [
        ("sepico_full", "gt", "out", None),
        ("sepico_full", "gt", "out_ratio0", 0.0),
        ("daformer_full", "gt", "out", None),
        ("daformer_full", "gt_ties", "out_ties_ratio_0", 0.0),
        ("daformer_full", "gt_ties", "out_ties_ratio_half", 0.5),
    ],
)
def test_labels_at_feature_resolution(
    read: Any,  # noqa: ANN401
    name: str,
    source: str,
    output: str,
    ratio: float | None,
) -> None:
    n, key = read(name), "downscale_label_ratio."
    labels, expected = n(f"{key}{source}").squeeze(1), n(f"{key}{output}").squeeze(1)
    height, width = expected.shape[1:]
    scale = labels.shape[1] // height
    # Rows and columns that no block holds are dropped there.
    labels = labels[:, : height * scale, : width * scale]
    ratio = n(f"{key}min_ratio") if ratio is None else ratio
    small = anchorda.resize_labels(labels, (height, width), mode="majority", min_ratio=ratio)
    assert torch.equal(small, expected)


def test_sepico_contrast_preparations(read: Any) -> None:  # noqa: ANN401
    n = read("sepico_full")
    features, labels = n("contrast_preparations.feat"), n("contrast_preparations.mask").squeeze(1)
    for suffix, mode in (("", "majority"), ("_nearest", "nearest")):
        small = anchorda.resize_labels(
            labels,
            features.shape[2:],
            mode=mode,  # type: ignore[arg-type]
            min_ratio=n("contrast_preparations.scale_min_ratio"),
        )
        kept = small != 255
        close(features.movedim(1, -1)[kept], n(f"contrast_preparations.out_feat{suffix}"))
        assert torch.equal(small[kept], n(f"contrast_preparations.out_mask{suffix}"))


def regularizer(features: Tensor, labels: Tensor, means: Tensor, temperature: float) -> Tensor:
    """Return SePiCo's regularizer: Σ log softmax of the mean feature's scores / (C log C)."""
    pixels = features.movedim(1, 0).flatten(1)[None]
    together = torch.where(labels == 255, 255, 0).flatten()[None]
    center, _ = anchorda.image_centroids(pixels, together, 1)
    p = anchorda.anchor_probabilities(center, means, similarity="dot", temperature=temperature)
    return p.log().sum() / (len(means) * math.log(len(means)))


def bank_loss(features: Tensor, labels: Tensor, bank: list[Tensor], temperature: float) -> Tensor:
    """Return SePiCo's contrast to a bank, which one method alone needs, in plain torch."""
    kept = labels != 255
    x, y = features.movedim(1, -1)[kept], labels[kept]
    means = torch.stack([vectors.mean(dim=0) for vectors in bank])
    others = x @ means.T / temperature
    own = torch.nn.functional.one_hot(y, len(bank)).bool()
    negatives = others.masked_fill(own, -math.inf).logsumexp(dim=1)
    losses = []
    for i, label in enumerate(y.tolist()):
        scores = bank[label] @ x[i] / temperature
        losses.append((torch.logaddexp(scores, negatives[i]) - scores).mean())
    return torch.stack(losses)


def mask_of(n: Reader, key: str, features: Tensor) -> Tensor:
    """Return labels at the resolution of the features."""
    mask, size = n(f"{key}mask").squeeze(1), features.shape[2:]
    return anchorda.resize_labels(mask, size, mode="majority", min_ratio=0.75)


@pytest.mark.parametrize("which", ["proto", "dist"])
def test_sepico_losses_with_every_option(read: Any, which: str) -> None:  # noqa: ANN401
    n, key = read("sepico_full"), f"{which}_contrastive."
    means = n(f"{key}mean")
    variances = n(f"{key}covariance") if which == "dist" else torch.zeros_like(means)
    features = n.leaf(f"{key}feat")
    labels = mask_of(n, key, features)
    first, second = n(f"{key}contrast_temp").tolist()

    def loss(temperature: float, weights: Tensor | None = None, ratio: float = 1.0) -> Tensor:
        if which == "proto":
            return anchorda.anchor_contrastive_loss(
                *(features, labels, means),
                similarity="dot",
                temperature=temperature,
                pixel_weights=weights,
            )
        return anchorda.anchor_distribution_loss(
            *(features, labels, means, ratio * variances),
            temperature=temperature,
            pixel_weights=weights,
        )

    def check(name: str, value: Tensor) -> None:
        close_with_gradient(value, features, n(f"{key}loss_{name}"), n(f"{key}grad_{name}"))

    check("0", loss(first))
    check("1", loss(second))
    check("reg", loss(second) + regularizer(features, labels, means, second))
    kept = labels != 255
    weights = torch.zeros(labels.shape, dtype=n.dtype)
    weights[kept] = n(f"{key}weight")
    check("weighted", loss(second, weights))
    of_class = torch.where(kept, n(f"{key}class_weight")[labels.clamp(max=4)], 0.0)
    weighted = loss(second, of_class)
    if which == "dist":
        # The class weight is for the cross-entropy alone there: the term of the own variance, which
        # is Σ x²·σ² / (2 T²), keeps a weight of 1.
        own = (features.square() * variances[labels.clamp(max=4)].movedim(-1, 1)).sum(dim=1)
        weighted = weighted + ((1 - of_class) * own / (2 * second**2))[kept].mean()
        check("ratio", loss(second, ratio=n(f"{key}ratio")))
    check("class_weight", weighted)
    # One pixel at a time: their list of losses.
    each = []
    for i in range(int(kept.sum())):
        one = torch.zeros(int(kept.sum()), dtype=n.dtype)
        one[i] = int(kept.sum())
        weights[kept] = one
        each.append(loss(second, weights).detach())
    close(torch.stack(each), n(f"{key}loss_none"))


def test_sepico_bank_loss_with_every_option(read: Any) -> None:  # noqa: ANN401
    n, key = read("sepico_full"), "bank_contrastive."
    lengths = n(f"{key}bank_lengths").tolist()
    bank, features = list(n(f"{key}bank").split(lengths)), n.leaf(f"{key}feat")
    labels = mask_of(n, key, features)
    first, second = n(f"{key}contrast_temp").tolist()
    # Their list of losses is in the order of the classes, so that weights meet other pixels.
    order = labels[labels != 255].argsort(stable=True)

    def each(temperature: float) -> Tensor:
        return bank_loss(features, labels, bank, temperature)[order]

    means = n(f"{key}mean")
    for name, value in (
        ("0", each(first).mean()),
        ("1", each(second).mean()),
        ("reg", each(second).mean() + regularizer(features, labels, means, second)),
        ("weighted", (each(second) * n(f"{key}weight")).mean()),
        ("class_weight", each(second).mean()),
    ):
        close_with_gradient(value, features, n(f"{key}loss_{name}"), n(f"{key}grad_{name}"))
    close(each(second), n(f"{key}loss_none"))


def test_sepico_regularizer(read: Any) -> None:  # noqa: ANN401
    n = read("sepico_full")
    labels = torch.zeros(79, dtype=torch.int64)
    for i, temperature in enumerate(n("proto_reg.contrast_temp").tolist()):
        features = n.leaf("proto_reg.feat")
        loss = regularizer(features, labels, n("proto_reg.mean"), temperature)
        close(loss, n(f"proto_reg.loss_{i}"))
        (grad,) = torch.autograd.grad(loss, features)
        # At temperature 100 their gradient is the rounding of a cancellation.
        close(grad, n(f"proto_reg.grad_{i}"), atol=2e-9)
    close(5 * math.log(5), n("proto_reg.contrast_norm"))


def test_sepico_several_layers(read: Any) -> None:  # noqa: ANN401
    n = read("sepico_full")
    leaves = [n.leaf("multi_layer.feat_0"), n.leaf("multi_layer.feat_1")]
    labels = mask_of(n, "multi_layer.", leaves[0])
    contrast = anchorda.AnchorContrastiveLoss(n("multi_layer.contrast_temp"), similarity="dot")
    losses = [
        weight * contrast(leaf, labels, n(f"multi_layer.mean_{i}"))
        for i, (leaf, weight) in enumerate(
            zip(leaves, n("multi_layer.loss_weight").tolist(), strict=True)
        )
    ]
    close(sum(losses), n("multi_layer.loss"))
    for i, grad in enumerate(torch.autograd.grad(sum(losses), leaves)):
        close(grad, n(f"multi_layer.grad_{i}"))


def test_changed_by_the_contract_an_unseen_class_does_not_compete(read: Any) -> None:  # noqa: ANN401
    """Their zero mean competes with a score of 0; here a class without features has none."""
    n = read("sepico")
    means, seen = n("loss.means").clone(), torch.tensor([True, True, True, True, False])
    means[4] = 0
    labels = torch.where(n("loss.resized_labels") == 4, 255, n("loss.resized_labels"))
    features, temperature = n("loss.features"), n("loss.temperature")
    theirs = anchorda.anchor_contrastive_loss(
        features, labels, means, similarity="dot", temperature=temperature
    )
    ours = anchorda.anchor_contrastive_loss(
        features, labels, seen_rows(means, seen), similarity="dot", temperature=temperature
    )
    kept = labels != 255
    scores = features.movedim(1, -1)[kept] @ means.T / temperature
    targets = labels[kept]
    close(theirs, torch.nn.functional.cross_entropy(scores, targets))
    close(ours, torch.nn.functional.cross_entropy(scores[:, :4], targets))
    assert ours < theirs
    # A label of the unseen class counts there, and is ignored here.
    only = torch.full_like(labels, 4)
    assert anchorda.anchor_contrastive_loss(features, only, means, similarity="dot") > 1
    assert anchorda.anchor_contrastive_loss(features, only, seen_rows(means, seen)) == 0


def test_changed_by_the_contract_nothing_labeled_is_a_connected_zero(read: Any) -> None:  # noqa: ANN401
    """SePiCo's zero has no graph, and DAFormer's mean of nothing is NaN."""
    n = read("sepico_full")
    features = n.leaf("dist_contrastive.feat")
    nothing = torch.full_like(features[:, 0], 255, dtype=torch.int64).detach()
    means, variances = n("dist_contrastive.mean"), n("dist_contrastive.covariance")
    for key, loss in (
        ("proto", anchorda.anchor_contrastive_loss(features, nothing, means, similarity="dot")),
        ("dist", anchorda.anchor_distribution_loss(features, nothing, means, variances)),
    ):
        assert n(f"{key}_contrastive.loss_all_ignored") == loss.item() == 0
        (grad,) = torch.autograd.grad(loss, features)  # theirs: nothing to differentiate
        assert not grad.any()
    n = read("daformer_full")
    features = n.leaf("calc_feat_dist.feat")
    loss = anchorda.feature_distance_loss(
        features, n("calc_feat_dist.feat_imnet"), nothing, classes=[1, 3, 4]
    )
    assert math.isnan(n("calc_feat_dist.loss_no_pixels"))
    assert loss.item() == 0
    (grad,) = torch.autograd.grad(loss, features)
    close(grad, n("calc_feat_dist.grad_no_pixels"))


# --------------------------------------------------------------------------------------- DAFormer


def test_daformer_feature_distance(read: Any) -> None:  # noqa: ANN401
    n = read("daformer_full")
    features, reference = n.leaf("calc_feat_dist.feat"), n("calc_feat_dist.feat_imnet")
    labels = anchorda.resize_labels(
        n("calc_feat_dist.gt").squeeze(1),
        features.shape[2:],
        mode="majority",
        min_ratio=n("calc_feat_dist.scale_min_ratio"),
    )
    assert torch.equal(labels, n("calc_feat_dist.gt_rescaled").squeeze(1))
    classes = n("calc_feat_dist.classes").tolist()
    mask = sum(labels == c for c in classes)
    assert torch.equal(mask, n("calc_feat_dist.mask").squeeze(1).long())
    weight = n("calc_feat_dist.lambda")
    loss = weight * anchorda.feature_distance_loss(features, reference, labels, classes=classes)
    close_with_gradient(loss, features, n("calc_feat_dist.loss"), n("calc_feat_dist.grad"))
    loss = weight * anchorda.feature_distance_loss(features, reference)
    close_with_gradient(
        loss, features, n("calc_feat_dist.loss_all_pixels"), n("calc_feat_dist.grad_all_pixels")
    )
    features, mask = n.leaf("masked_feat_dist.f1"), n("masked_feat_dist.mask").squeeze(1).long()
    loss = anchorda.feature_distance_loss(features, n("masked_feat_dist.f2"), mask, classes=[1])
    close_with_gradient(loss, features, n("masked_feat_dist.out"), n("masked_feat_dist.grad"))


def rare_class_probabilities(counts: Tensor, temperature: float) -> Tensor:
    """Return the sampling probabilities of one method, in plain torch."""
    frequency = counts.double() / counts.sum()
    return ((1 - frequency) / temperature).softmax(dim=0)


def test_daformer_rare_class_sampling(read: Any) -> None:  # noqa: ANN401
    n = read("daformer_full")
    key = "get_rcs_class_probs."
    named = n(f"{key}pixel_counts").sum(dim=0)
    first, second = n(f"{key}temperature").tolist()
    for suffix, temperature, classes in (
        ("0", first, named.nonzero().flatten()),
        ("1", second, named.nonzero().flatten()),
        ("zero_count", second, torch.arange(5)),
    ):
        counts = named[classes]
        order = counts.argsort(stable=True)
        assert torch.equal(classes[order], n(f"{key}classes_{suffix}"))
        p = rare_class_probabilities(counts, temperature)[order]
        close(p, n(f"{key}probs_{suffix}"))


def test_daformer_pseudo_labels_and_weights(read: Any) -> None:  # noqa: ANN401
    n = read("daformer_full")
    labels, scores = anchorda.ProbabilityPseudoLabeler(0.0)(n("pseudo_weight.ema_logits"))
    assert torch.equal(labels, n("pseudo_weight.pseudo_label"))
    close(scores, n("pseudo_weight.pseudo_prob"))
    # The share of sure ones is the weight of all pixels.
    share = (scores >= n("pseudo_weight.threshold")).sum() / scores.numel()
    weights = torch.ones_like(scores) * share
    close(weights, n("pseudo_weight.weight_no_rows"))
    weights[:, : int(n("pseudo_weight.ignore_top"))] = 0
    weights[:, -int(n("pseudo_weight.ignore_bottom")) :] = 0
    close(weights, n("pseudo_weight.weight"))
    # Mixing, plain torch.
    mask = n("mix.mask").squeeze(1).bool()
    mixed = torch.where(mask, n("mix.gt").squeeze(1), n("mix.pseudo_label"))
    assert torch.equal(mixed, n("mix.mixed_label").squeeze(1))
    close(torch.where(mask, 1.0, n("mix.pseudo_weight")), n("mix.mixed_weight"))


def test_daformer_weighted_cross_entropy(read: Any) -> None:  # noqa: ANN401
    # They divide by all pixels, ignored ones too.
    n, key = read("daformer_full"), "cross_entropy."
    logits, labels, weights = n.leaf(f"{key}logits"), n(f"{key}label"), n(f"{key}weight")
    labeled = (labels != 255).double().mean()
    of_class = torch.where(labels == 255, 0.0, n(f"{key}class_weight")[labels.clamp(max=4)])
    for suffix, pixel_weights in (
        ("", weights),
        ("_unweighted", None),
        # The weights of the classes do not divide there, so they are weights of pixels here.
        ("_class_weight", weights * of_class),
    ):
        loss = anchorda.discriminative_loss(logits, labels, pixel_weights=pixel_weights)
        close_with_gradient(
            loss * labeled, logits, n(f"{key}loss{suffix}"), n(f"{key}grad{suffix}")
        )


def test_daformer_moving_average(read: Any) -> None:  # noqa: ANN401
    n = read("daformer_full")
    # Plain torch: the first call copies, and the buffers of normalization stay.
    student = n("update_ema.student")
    teacher = student[0]
    for i, iteration in enumerate(n("update_ema.iters").tolist()):
        if iteration > 0:
            alpha = min(1 - 1 / (iteration + 1), n("update_ema.alpha"))
            teacher = alpha * teacher + (1 - alpha) * student[i]
        close(teacher, n("update_ema.teacher")[i])
    assert not n("update_ema.teacher_buffer").any()
    assert n("update_ema.student_buffer").all()


# ------------------------------------------------------------------------- SHOT, T3A, SND, ProtoSeg


def shot_labels(features: Tensor, logits: Tensor, threshold: float) -> Tensor:
    """Return SHOT's labels: soft centroids, then twice the nearest by cosine."""
    ones = torch.ones_like(features[:, :1])
    x = normalize(torch.cat([features, ones], dim=1), dim=1)
    memberships, labels = logits.softmax(dim=1), logits.argmax(dim=1)
    for _ in range(2):
        sums, counts = anchorda.soft_class_sums(x, memberships)
        present = labels.bincount(minlength=logits.shape[1]) > threshold
        centroids = seen_rows(sums / (1e-8 + counts[:, None]), present)
        similar = anchorda.anchor_probabilities(x, centroids.to(x.dtype), similarity="cosine")
        labels = similar.argmax(dim=1)
        memberships = torch.nn.functional.one_hot(labels, logits.shape[1]).to(x.dtype)
    return labels


def test_shot_labels(read: Any) -> None:  # noqa: ANN401
    n = read("shot")
    features, logits = n("labels.features"), n("labels.logits")
    assert torch.equal(shot_labels(features, logits, n("labels.threshold")), n("labels.labels"))
    assert torch.equal(shot_labels(features, logits, 9), n("labels.labels_threshold_9"))


def test_shot_information_maximization(read: Any) -> None:  # noqa: ANN401
    n = read("shot")
    logits = n.leaf("information.logits")
    loss = anchorda.information_maximization_loss(logits)
    close_with_gradient(loss, logits, n("information.loss"), n("information.grad"))


def test_t3a(read: Any) -> None:  # noqa: ANN401
    n = read("t3a")
    # Plain torch: the supports are one method's.
    weight, bias = n("weight"), n("bias")

    def scored(x: Tensor) -> tuple[Tensor, Tensor]:
        p = (x @ weight.T + bias).softmax(dim=1)
        return p.argmax(dim=1), -(p * p.log()).sum(dim=1)

    supports = weight
    labels, entropies = scored(weight)
    for r in range(4):
        x = n(f"features_{r}")
        new_labels, new_entropies = scored(x)
        supports = torch.cat([supports, x])
        labels, entropies = torch.cat([labels, new_labels]), torch.cat([entropies, new_entropies])
        order = entropies.argsort(stable=True)
        of_class = torch.nn.functional.one_hot(labels[order], 5)
        sure = (of_class.cumsum(dim=0) * of_class).sum(dim=1) <= n("filter")
        kept = torch.where(sure, labels[order], -1)
        sums, _ = anchorda.class_sums(normalize(supports[order], dim=1), kept, 5)
        close(x @ normalize(sums, dim=1).to(x.dtype).T, n(f"logits_{r}"))


def test_snd(read: Any) -> None:  # noqa: ANN401
    n = read("snd")
    density = anchorda.SoftNeighborhoodDensity(n("temperature"))
    density.update(n("probabilities").log())
    close(density.compute(), n("density"))


def test_protoseg(read: Any) -> None:  # noqa: ANN401
    n = read("protoseg")
    assignments = anchorda.sinkhorn_assignments(n("sinkhorn.scores"))
    close(assignments, n("sinkhorn.assignments"))
    assert torch.equal(assignments.argmax(dim=1), n("sinkhorn.indices"))
    logits, targets = n.leaf("logits"), n("targets")
    contrast = anchorda.discriminative_loss(logits, targets)
    close_with_gradient(contrast, logits, n("ppc.loss"), n("ppc.grad"))
    # (1 − cosine)² is a quarter of the fourth power of the distance between unit vectors.
    own = logits.gather(1, targets.clamp(min=0)[:, None]).squeeze(1)
    pull = (1 - own).square()[targets >= 0].mean()
    close_with_gradient(pull, logits, n("ppd.loss"), n("ppd.grad"))
