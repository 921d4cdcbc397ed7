"""Rejections: what was expected, what came, and a likely fix, to the letter."""

import ast
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import anchorda
from anchorda import (
    AnchorContrastiveLoss,
    AnchorDistanceLoss,
    AnchorPseudoLabeler,
    CategoryAnchors,
    ConfusionMatrix,
    DiscriminativeLoss,
    ProbabilityPseudoLabeler,
    PseudoLabelQuality,
    _checks,
)
from tests import error_table
from tests.fuzz import FORM

FEATURES = torch.zeros(2, 3, 4, 5)
LABELS = torch.zeros(2, 4, 5, dtype=torch.int64)
ANCHORS = torch.zeros(6, 3)
SHAPE = "Expected `labels` of shape (N, H, W) = (2, 4, 5) to match `{0}`, but got "

# Everything public that takes features, (features, labels), (features, anchors) or logits.
TAKE_FEATURES: dict[str, Callable[[Any], Any]] = {
    "class_sums": lambda x: anchorda.class_sums(x, LABELS, 6),
    "image_centroids": lambda x: anchorda.image_centroids(x, LABELS, 6),
    "CategoryAnchors": lambda x: CategoryAnchors(6, 3).update(x, LABELS),
    "anchor_distances": lambda x: anchorda.anchor_distances(x, ANCHORS),
    "AnchorPseudoLabeler": lambda x: AnchorPseudoLabeler()(x, ANCHORS),
    "AnchorDistanceLoss": lambda x: AnchorDistanceLoss()(x, LABELS, ANCHORS),
    "AnchorContrastiveLoss": lambda x: AnchorContrastiveLoss()(x, LABELS, ANCHORS),
}
TAKE_LABELS: dict[str, Callable[[Any], Any]] = {
    "class_sums": lambda y: anchorda.class_sums(FEATURES, y, 6),
    "image_centroids": lambda y: anchorda.image_centroids(FEATURES, y, 6),
    "CategoryAnchors": lambda y: CategoryAnchors(6, 3).update(FEATURES, y),
    "AnchorDistanceLoss": lambda y: AnchorDistanceLoss()(FEATURES, y, ANCHORS),
    "AnchorContrastiveLoss": lambda y: AnchorContrastiveLoss()(FEATURES, y, ANCHORS),
}
TAKE_ANCHORS: dict[str, Callable[[Any], Any]] = {
    "anchor_distances": lambda a: anchorda.anchor_distances(FEATURES, a),
    "AnchorPseudoLabeler": lambda a: AnchorPseudoLabeler()(FEATURES, a),
    "AnchorDistanceLoss": lambda a: AnchorDistanceLoss()(FEATURES, LABELS, a),
    "AnchorContrastiveLoss": lambda a: AnchorContrastiveLoss()(FEATURES, LABELS, a),
}
TAKE_LOGITS: dict[str, Callable[[Any], Any]] = {
    "keep_correct": lambda z: anchorda.keep_correct(LABELS, z),
    "ProbabilityPseudoLabeler": lambda z: ProbabilityPseudoLabeler()(z),
    "DiscriminativeLoss": lambda z: DiscriminativeLoss()(z, LABELS),
}
LABELS_FOR_LOGITS: dict[str, Callable[[Any], Any]] = {
    "keep_correct": lambda y: anchorda.keep_correct(y, FEATURES),
    "DiscriminativeLoss": lambda y: DiscriminativeLoss()(FEATURES, y),
}


def assert_rejected(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as raised:
        call()
    assert str(raised.value) == message


@pytest.mark.parametrize("call", [*TAKE_FEATURES.values(), *TAKE_LOGITS.values()])
@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (
            [1.0],
            TypeError,
            "Expected `{0}` to be a torch.Tensor, but got list. "
            "Convert it with torch.as_tensor({0}).",
        ),
        (None, TypeError, "Expected `{}` to be a torch.Tensor, but got NoneType."),
        (
            torch.zeros(4),
            ValueError,
            "Expected `{0}` of shape (N, D, *), batch and channels first, but got (4,). "
            "Add the batch dimension with {0}.unsqueeze(0).",
        ),
        (
            FEATURES.int(),
            TypeError,
            "Expected `{0}` of a floating-point dtype, but got torch.int32. "
            "Convert them with {0}.float().",
        ),
    ],
)
def test_features_and_logits(
    call: Callable[[Any], Any], value: object, error: type[Exception], message: str
) -> None:
    name = "logits" if call in TAKE_LOGITS.values() else "features"
    assert_rejected(lambda: call(value), error, message.format(name))


@pytest.mark.parametrize("call", [*TAKE_LABELS.values(), *LABELS_FOR_LOGITS.values()])
@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (
            [0],
            TypeError,
            "Expected `labels` to be a torch.Tensor, but got list. "
            "Convert it with torch.as_tensor(labels).",
        ),
        *(
            (
                LABELS.to(dtype),
                TypeError,
                f"Expected `labels` of an integer dtype, but got {dtype}. "
                "Convert them with labels.long().",
            )
            for dtype in (torch.float32, torch.bool, torch.complex64)
        ),
        (
            torch.tensor(0),
            ValueError,
            "Expected `labels` of shape (N, *), but got a tensor without dimensions.",
        ),
        *(
            (value, ValueError, SHAPE + got)
            for value, got in (
                (
                    LABELS[:, None],
                    "(2, 1, 4, 5). Drop the channel dimension with labels.squeeze(1).",
                ),
                (
                    LABELS[:, :, :3],
                    "(2, 4, 3). Resize them with anchorda.resize_labels(labels, {0}.shape[2:]).",
                ),
                (LABELS[:1], "(1, 4, 5)."),
                (LABELS[0], "(4, 5)."),
            )
        ),
        (
            LABELS.to("meta"),
            ValueError,
            "Expected `labels` on cpu like `{0}`, but got meta. Move them with .to({0}.device).",
        ),
    ],
)
def test_labels(
    call: Callable[[Any], Any], value: object, error: type[Exception], message: str
) -> None:
    name = "logits" if call in LABELS_FOR_LOGITS.values() else "features"
    assert_rejected(lambda: call(value), error, message.format(name))


@pytest.mark.parametrize(
    ("shape", "dimensions"),
    [((2, 3), "(N,) = (2,)"), ((2, 3, 7), "(N, L) = (2, 7)"), ((2, 3, 1, 1, 1, 1), "(N, *)")],
)
def test_labels_of_other_ranks(shape: tuple[int, ...], dimensions: str) -> None:
    with pytest.raises(ValueError, match="Expected `labels`") as raised:
        anchorda.class_sums(torch.zeros(shape), torch.zeros(9, dtype=torch.int64), 2)
    assert f"of shape {dimensions}" in str(raised.value)


@pytest.mark.parametrize("call", TAKE_ANCHORS.values(), ids=TAKE_ANCHORS)
@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (
            [1.0],
            TypeError,
            "Expected `anchors` to be a torch.Tensor, but got list. "
            "Convert it with torch.as_tensor(anchors).",
        ),
        (
            ANCHORS.long(),
            TypeError,
            "Expected `anchors` of a floating-point dtype, but got torch.int64. "
            "Convert them with anchors.float().",
        ),
        *(
            (
                torch.zeros(shape),
                ValueError,
                "Expected `anchors` of shape (C, D) or (C, M, D) with D = 3 to match `features`, "
                f"but got {shape}. Compute the anchors from features of the same layer.",
            )
            for shape in ((6, 4), (3,), (0, 3), (6, 1, 4), (6, 0, 3), (6, 1, 1, 3))
        ),
        (
            ANCHORS.to("meta"),
            ValueError,
            "Expected `anchors` on cpu like `features`, but got meta. "
            "Move them with .to(features.device).",
        ),
    ],
)
def test_anchors(
    call: Callable[[Any], Any], value: object, error: type[Exception], message: str
) -> None:
    assert_rejected(lambda: call(value), error, message)


VALUE_ERRORS: list[tuple[Callable[[], Any], str]] = [
    # Numbers.
    (
        lambda: CategoryAnchors(2, 3, momentum=float("nan")),
        "Expected `momentum` in [0.0, 1.0], but got nan.",
    ),
    (
        lambda: CategoryAnchors(2, 3, max_count=10, momentum=0.1),
        "Expected `max_count` or `momentum`, but got both: a capped running mean already "
        "forgets, as an exponential moving average does.",
    ),
    (
        lambda: anchorda.class_sums(FEATURES, LABELS, -1),
        "Expected `num_classes` of at least 1, but got -1.",
    ),
    (
        lambda: anchorda.image_centroids(FEATURES, LABELS, 6, min_pixels=0),
        "Expected `min_pixels` of at least 1, but got 0.",
    ),
    (
        lambda: DiscriminativeLoss(label_smoothing=-0.1),
        "Expected `label_smoothing` in [0.0, 1.0], but got -0.1.",
    ),
    # Choices.
    (
        lambda: AnchorDistanceLoss(average="image"),  # type: ignore[arg-type]
        "Expected `average` to be one of 'pixel', 'class', but got 'image'.",
    ),
    (
        lambda: anchorda.combine_pseudo_labels(LABELS, LABELS, "or"),  # type: ignore[arg-type]
        "Expected `rule` to be one of 'agree', 'union', but got 'or'.",
    ),
    (
        lambda: anchorda.resize_labels(LABELS, (2, 2), mode="area"),  # type: ignore[arg-type]
        "Expected `mode` to be one of 'nearest', 'majority', but got 'area'.",
    ),
    # Streams.
    (
        lambda: CategoryAnchors(6, 2).update(FEATURES, LABELS),
        "Expected `features` of shape (N, D, *) with D = 2, but got (2, 3, 4, 5). "
        "Set feature_dim=3.",
    ),
    (
        lambda: CategoryAnchors(6, 3).update(FEATURES.to("meta"), LABELS.to("meta")),
        "Expected `anchors` on meta like `features`, but got cpu. "
        "Move them with .to(features.device).",
    ),
    (
        lambda: CategoryAnchors(2, 3).merge(CategoryAnchors(2, 4)),
        "Expected `other` to be CategoryAnchors(num_classes=2, feature_dim=3, max_count=None, "
        "momentum=None), but got CategoryAnchors(num_classes=2, feature_dim=4, max_count=None, "
        "momentum=None). Merge equal settings only.",
    ),
    (
        lambda: CategoryAnchors(2, 3).merge(CategoryAnchors(2, 3).to("meta")),
        "Expected `other` on cpu like `anchors`, but got meta. Move them with .to(anchors.device).",
    ),
    # Label maps.
    (
        lambda: anchorda.resize_labels(LABELS, (3, 0)),
        "Expected `size` to hold 2 integers of at least 1, one for each spatial dimension of "
        "`labels` of shape (2, 4, 5), but got (3, 0). "
        "Pass the size of the features, features.shape[2:].",
    ),
    (
        lambda: anchorda.combine_pseudo_labels(LABELS, LABELS.to("meta")),
        "Expected `second` on cpu like `first`, but got meta. Move them with .to(first.device).",
    ),
    # Minimum scores and weights.
    (
        lambda: AnchorPseudoLabeler(torch.zeros(2, 2)),
        "Expected `min_margin` to be one number, or a tensor, array or sequence of shape (C,) with "
        "one for each class, but got (2, 2).",
    ),
    (
        lambda: AnchorPseudoLabeler(float("nan")),
        "Expected `min_margin` without NaN, but got nan. "
        "Use float('inf') for a class that shall not be labeled.",
    ),
    (
        lambda: ProbabilityPseudoLabeler()(torch.zeros(2, 0, 3)),
        "Expected `logits` of shape (N, C, *) with at least two classes, but got (2, 0, 3).",
    ),
    (
        lambda: ProbabilityPseudoLabeler(torch.zeros(3))(FEATURES.to("meta")),
        "Expected `min_probability` on meta like `logits`, but got cpu. "
        "Move them with .to(logits.device).",
    ),
    (
        lambda: ProbabilityPseudoLabeler(torch.zeros(5))(FEATURES),
        "Expected `min_probability` to be one number or of shape (C,) = (3,), but got (5,).",
    ),
    (
        lambda: AnchorPseudoLabeler(torch.zeros(6))(FEATURES.to("meta"), ANCHORS.to("meta")),
        "Expected `min_margin` on meta like `anchors`, but got cpu. "
        "Move them with .to(anchors.device).",
    ),
    (
        lambda: DiscriminativeLoss(weight=torch.ones(2))(FEATURES, LABELS),
        "Expected `weight` of shape (C,) = (3,) to match `logits`, but got (2,).",
    ),
    (
        lambda: DiscriminativeLoss(weight=torch.ones(3, device="meta"))(FEATURES, LABELS),
        "Expected `weight` on cpu like `logits`, but got meta. Move them with .to(logits.device).",
    ),
    (
        lambda: ConfusionMatrix(3).update(LABELS[:1], LABELS),
        "Expected `predictions` of shape (2, 4, 5) to match `labels`, but got (1, 4, 5).",
    ),
    (
        lambda: ConfusionMatrix(3).update(LABELS[:, 1:], LABELS),
        "Expected `predictions` of shape (2, 4, 5) to match `labels`, but got (2, 3, 5). "
        "Resize them with anchorda.resize_labels(predictions, labels.shape[1:]).",
    ),
    (
        lambda: ConfusionMatrix(3).update(LABELS.to("meta"), LABELS.to("meta")),
        "Expected `counts` on meta like `labels`, but got cpu. Move them with .to(labels.device).",
    ),
]
TYPE_ERRORS: list[tuple[Callable[[], Any], str]] = [
    (
        lambda: CategoryAnchors(2, 3.0),  # type: ignore[arg-type]
        "Expected `feature_dim` to be an int, but got 3.0.",
    ),
    (
        lambda: CategoryAnchors(2, 3, max_count=True),
        "Expected `max_count` to be an int, but got True.",
    ),
    (
        lambda: CategoryAnchors(6, 3).update_sums(torch.zeros(6, 3), torch.zeros(6)),
        "Expected `counts` of an integer dtype, but got torch.float32. "
        "Convert them with counts.long().",
    ),
    (
        lambda: ConfusionMatrix(3).merge(PseudoLabelQuality(3)),  # type: ignore[arg-type]
        "Expected `other` to be ConfusionMatrix, but got PseudoLabelQuality.",
    ),
    (
        lambda: PseudoLabelQuality(3).update(LABELS.float(), LABELS),
        "Expected `pseudo_labels` of an integer dtype, but got torch.float32. "
        "Convert them with pseudo_labels.long().",
    ),
    (
        lambda: PseudoLabelQuality(2.0),  # type: ignore[arg-type]
        "Expected `num_classes` to be an int, but got 2.0.",
    ),
]


@pytest.mark.parametrize(("call", "message"), VALUE_ERRORS)
def test_wrong_values(call: Callable[[], Any], message: str) -> None:
    assert_rejected(call, ValueError, message)


@pytest.mark.parametrize(("call", "message"), TYPE_ERRORS)
def test_wrong_types(call: Callable[[], Any], message: str) -> None:
    assert_rejected(call, TypeError, message)


@pytest.mark.parametrize(
    "call",
    [
        lambda: AnchorPseudoLabeler(None),  # type: ignore[arg-type]
        lambda: AnchorPseudoLabeler(9.0, ignore_index=255.0)(FEATURES, ANCHORS),  # type: ignore[arg-type]
        lambda: anchorda.discriminative_loss(FEATURES, LABELS, weight="balanced"),  # type: ignore[arg-type]
        lambda: anchorda.resize_labels(LABELS, (2.5, 2.5)),  # type: ignore[arg-type]
    ],
    ids=["min_margin", "ignore_index", "weight", "size_entries"],
)
def test_wrong_types_are_rejected_at_the_boundary(call: Callable[[], Any]) -> None:
    with pytest.raises((TypeError, ValueError), match=r"^Expected `"):
        call()


def test_the_guide_has_an_example_of_every_error() -> None:
    guide = error_table.GUIDE.read_text(encoding="utf-8")
    assert error_table.with_table(guide) == guide, "run python -m tests.error_table"
    errors = {example: error_table.error_of(example) for example in error_table.EXAMPLES}
    assert all(FORM.match(str(error)) for error, _ in errors.values())
    shown = {name for _, names in errors.values() for name in names}
    tree = ast.parse(inspect.getsource(_checks))
    raising = {
        function.name
        for function in tree.body
        if isinstance(function, ast.FunctionDef)
        and any(isinstance(node, ast.Raise) for node in ast.walk(function))
    }
    assert raising <= shown, f"no example of {sorted(raising - shown)}"


def test_nothing_is_counted_before_it_is_checked() -> None:
    anchors, confusion = CategoryAnchors(6, 3), ConfusionMatrix(3)
    bad: list[tuple[Tensor, Tensor]] = [(FEATURES, LABELS[:1]), (FEATURES[:, :2], LABELS)]
    for features, labels in bad:
        with pytest.raises(ValueError, match="Expected"):
            anchors.update(features, labels)
    with pytest.raises(ValueError, match="Expected"):
        confusion.update(LABELS[:1], LABELS)
    assert not anchors.counts.any()
    assert not confusion.counts.any()
