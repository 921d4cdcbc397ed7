"""Measure what `anchorda.ScoreCalibrator` gives away against exact quantiles, and what it costs.

    python benchmarks/calibration.py

For scores of several kinds and scales: how far the minimum for a coverage lies below the exact
quantile, and by how much more than asked for it covers; the largest over coverages from 1 to 99 %.
Then the memory of its state, and the time of an update beside that of labeling the same pixels,
measured in turns. The tables, in Markdown, go to the terminal.
"""

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from anchorda import AnchorPseudoLabeler, ScoreCalibrator

PIXELS = 1_000_000
COVERAGES = [0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99]


def draw_scores() -> dict[str, Tensor]:
    """Return scores as networks have them, from unit-norm features to saturated probabilities."""
    margins = torch.randn(PIXELS).abs() * torch.rand(PIXELS)
    logits = torch.randn(PIXELS, 19)
    return {
        "margins of about 0.01": 0.01 * margins,
        "margins of about 1": margins,
        "margins of about 100": 100 * margins,
        "relative margins": margins / (margins + torch.rand(PIXELS)),
        "probabilities, unsure": (2 * logits).softmax(dim=1).amax(dim=1),
        "probabilities, saturated": (10 * logits).softmax(dim=1).amax(dim=1),
    }


def errors(scores: Tensor) -> tuple[float, float, float]:
    """Return the largest errors of a minimum, relative to s and to 1 − s, and of a coverage."""
    calibrator = ScoreCalibrator(1)
    calibrator.update(torch.zeros(PIXELS, dtype=torch.int64), scores)
    ordered = scores.double().sort(descending=True).values
    of_score, to_one, of_coverage = 0.0, 0.0, 0.0
    for coverage in COVERAGES:
        exact = ordered[round(coverage * PIXELS) - 1].item()
        minimum = calibrator.min_score_for_coverage(coverage).item()
        of_score = max(of_score, (exact - minimum) / exact)
        if 0.5 < exact < 1:
            to_one = max(to_one, (exact - minimum) / (1 - minimum))
        covered = (scores > minimum).double().mean().item()
        of_coverage = max(of_coverage, covered - coverage)
    return of_score, to_one, of_coverage


def milliseconds(function: Callable[[], object]) -> float:
    """Return the time of one call."""
    start = time.perf_counter()
    function()
    return 1000 * (time.perf_counter() - start)


def main() -> None:
    """Print both tables."""
    torch.manual_seed(0)
    print("| scores | error of s | error of 1 − s, where s > 0.5 | coverage in excess, points |")
    print("| :-- | --: | --: | --: |")
    for name, scores in draw_scores().items():
        of_score, to_one, of_coverage = (100 * error for error in errors(scores))
        near_one = f"{to_one:.2f} %" if to_one else "–"
        print(f"| {name} | {of_score:.2f} % | {near_one} | {of_coverage:.2f} |")

    features, anchors = torch.randn(2, 256, 128, 224), torch.randn(19, 256)
    labeler, calibrator = AnchorPseudoLabeler(float("-inf")), ScoreCalibrator(19)
    labels, scores = labeler(features, anchors)
    times = [
        (
            milliseconds(lambda: labeler(features, anchors)),
            milliseconds(lambda: calibrator.update(labels, scores, labels)),
        )
        for _ in range(20)
    ][5:]
    label, update = (statistics.median(column) for column in zip(*times, strict=True))
    print(f"\nState for 19 classes: {calibrator.counts.nbytes:,} bytes.")
    print(
        f"2×256×128×224 features: labeling {label:.1f} ms, calibration {update:.1f} ms, "
        f"{100 * update / label:.1f} % of it."
    )


if __name__ == "__main__":
    main()
