"""The errors of the public boundary, with an example of each, as the table in CONTRIBUTING.md.

    python -m tests.error_table

writes the table anew; a test compares it, and requires an example of every function of `_checks`
that rejects something.
"""

import sys
import traceback
from pathlib import Path

import numpy as np
import torch

import anchorda

GUIDE = Path(__file__).resolve().parents[1] / "CONTRIBUTING.md"
BEGIN, END = "<!-- errors: python -m tests.error_table -->\n", "<!-- end of errors -->\n"

# What the examples are about: two images of four classes with features of three dimensions.
NAMES = {
    "anchorda": anchorda,
    "np": np,
    "torch": torch,
    "features": torch.zeros(2, 3, 4, 6),
    "labels": torch.zeros(2, 4, 6, dtype=torch.int64),
    "logits": torch.zeros(2, 4, 4, 6),
    "anchors": torch.zeros(4, 3),
    "counts": torch.ones(4, dtype=torch.int64),
}
EXAMPLES = [
    "anchorda.class_sums(features.numpy(), labels, 4)",
    "anchorda.class_sums(features.to_sparse(), labels, 4)",
    "anchorda.class_sums(features[0, 0, 0], labels, 4)",
    "anchorda.class_sums(features.int(), labels, 4)",
    "anchorda.class_sums(features, labels.float(), 4)",
    "anchorda.resize_labels(labels[0, 0, 0], ())",
    "anchorda.class_sums(features, labels[:, None], 4)",
    "anchorda.class_sums(features, labels[:, ::2, ::2], 4)",
    "anchorda.class_sums(features.movedim(1, -1), labels, 4)",
    "anchorda.class_sums(features, labels.mT, 4)",
    "anchorda.class_sums(features, labels.to('meta'), 4)",
    "anchorda.keep_correct(labels, logits[:, :1])",
    "anchorda.anchor_distances(features, anchors.T)",
    "anchorda.margin_limits(anchors[0])",
    "anchorda.anchor_health(anchors[None], counts)",
    "anchorda.anchor_health(anchors, counts, previous=anchors[:2])",
    "anchorda.WithinClassCovariance(4, 5).update(features, labels)",
    "anchorda.soft_class_sums(features, logits[:, :, ::2])",
    "anchorda.margin_limits(anchors.long().numpy())",
    "anchorda.anchor_health(anchors, np.ones(4))",
    "anchorda.anchor_health(anchors, counts[:2])",
    "anchorda.warn_unreachable_margins(1.0, anchors.to('meta'))",
    "anchorda.CategoryAnchors(4, 3).update_sums(anchors[:2], counts)",
    "anchorda.CategoryAnchors(4, 3).merge(anchors)",
    "anchorda.CategoryAnchors(4.0, 3)",
    "anchorda.CategoryAnchors(0, 3)",
    "anchorda.CategoryAnchors(4, 3, momentum='0.1')",
    "anchorda.CategoryAnchors(4, 3, momentum=2)",
    "anchorda.AnchorContrastiveLoss(temperature=0)",
    "anchorda.AnchorDistanceLoss('cosine')",
    "anchorda.AnchorPseudoLabeler([0.1, None])",
    "anchorda.AnchorPseudoLabeler([0.1, 0.2])(features, anchors)",
    "anchorda.AnchorPseudoLabeler(relative=1)",
    "anchorda.keep_correct(labels, logits, ignore_index=0)",
    "anchorda.keep_correct(labels.to(torch.int8), logits)",
    "anchorda.resize_labels(labels, 2)",
    "anchorda.resize_labels(labels[:, None], (2, 3))",
    "anchorda.combine_pseudo_labels(labels, labels[:, ::2])",
    "anchorda.ScoreCalibrator(4).update(labels, features)",
    "anchorda.discriminative_loss(logits, labels, pixel_weights=labels)",
    "anchorda.feature_distance_loss(features, features, labels, classes='0')",
    "anchorda.warn_unreachable_margins(9.0, anchors, class_names=['road'])",
    "anchorda.warn_unreachable_margins(9.0, anchors, class_names='abcd')",
    "anchorda.StageLabeler('network.pt', anchors)",
]


def error_of(example: str) -> tuple[Exception, list[str]]:
    """Return the error of an example, and the functions of `_checks` that it passes through."""
    try:
        eval(example, dict(NAMES))
    except (TypeError, ValueError) as error:
        frames = traceback.extract_tb(error.__traceback__)
        return error, [frame.name for frame in frames if frame.filename.endswith("_checks.py")]
    raise AssertionError(f"{example} raises nothing")


def table() -> str:
    """Return the table in Markdown."""
    lines = ["| call | error |", "| --- | --- |"]
    for example in EXAMPLES:
        error, _ = error_of(example)
        message = str(error).replace("|", "\\|").replace("`", "")
        call = example.removeprefix("anchorda.")
        lines.append(f"| `{call}` | {type(error).__name__}: {message} |")
    return "\n".join(lines) + "\n"


def with_table(guide: str) -> str:
    """Return the guide with the table of today."""
    head, found, rest = guide.partition(BEGIN)
    tail = rest.partition(END)[2]
    assert found, f"{GUIDE.name} has no {BEGIN}"
    return head + BEGIN + table() + END + tail


if __name__ == "__main__":
    GUIDE.write_text(with_table(GUIDE.read_text(encoding="utf-8")), encoding="utf-8")
    sys.stdout.write(f"{len(EXAMPLES)} errors in {GUIDE.name}\n")
