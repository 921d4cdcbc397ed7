"""Error of the sample that `SoftNeighborhoodDensity` stores, against the exact score.

    python benchmarks/density_sample.py    # a minute on one core

The exact score of 10⁶ pixels takes 10¹² products. It is known all the same where the pixels are
copies of fewer distinct ones: then each stands for its copies, in both sums of the score.
"""

import argparse

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from anchorda import SoftNeighborhoodDensity

TEMPERATURE = 0.05
SIZES = (64, 128, 256)


def predictions(pixels: int, num_classes: int, seed: int) -> Tensor:
    """Return logits (P, C) of classes from frequent to rare, of random certainty."""
    generator = torch.Generator().manual_seed(seed)
    shares = torch.rand(num_classes, generator=generator) ** 4
    classes = torch.multinomial(shares, pixels, replacement=True, generator=generator)
    certain = 8 * torch.rand(pixels, 1, generator=generator)
    noise = torch.randn(pixels, num_classes, generator=generator)
    return noise + certain * one_hot(classes, num_classes)


def exact_density(logits: Tensor, copies: int) -> float:
    """Return the exact score of repeated pixels, computed in chunks of rows."""
    x = normalize(logits.double().softmax(dim=1), dim=1)
    total = 0.0
    for start in range(0, len(x), 256):
        scores = ((x[start : start + 256] @ x.T - 1) / TEMPERATURE).exp()
        index = torch.arange(len(scores))
        multiplicity = torch.full_like(scores, copies)
        multiplicity[index, index + start] -= 1  # a pixel is no neighbor of itself
        itself = torch.full((len(scores), 1), -2 / TEMPERATURE, dtype=x.dtype).exp()
        z = (multiplicity * scores).sum(dim=1, keepdim=True) + itself
        s, own = scores / z, itself / z
        entropy = -(multiplicity * s * (s + 1e-5).log()).sum(dim=1, keepdim=True)
        total += float((entropy - own * (own + 1e-5).log()).sum())
    return total / len(x)


def main() -> None:
    """Print a table: rows are sample sizes, columns the largest error over seeds."""
    parser = argparse.ArgumentParser(description="Error of a sampled density.")
    parser.add_argument("--pixels", type=int, default=10**6)
    parser.add_argument("--distinct", type=int, default=5000)
    parser.add_argument("--seeds", type=int, default=5)
    settings = parser.parse_args()
    copies = settings.pixels // settings.distinct
    batches = [min(10, copies - start) for start in range(0, copies, 10)]
    errors: dict[tuple[int, int], float] = {}
    for num_classes in (7, 19):
        logits = predictions(settings.distinct, num_classes, seed=0)
        expected = exact_density(logits, copies)
        for size in SIZES:
            for seed in range(settings.seeds):
                density = SoftNeighborhoodDensity(TEMPERATURE, pixels_per_class=size, seed=seed)
                for repeats in batches:
                    density.update(logits.repeat(repeats, 1))
                error = abs(density.compute().item() / expected - 1)
                errors[num_classes, size] = max(error, errors.get((num_classes, size), 0.0))
    print(f"Largest error of {settings.seeds} seeds, {copies * settings.distinct} pixels")
    print("| pixels of each class | 7 classes | 19 classes |\n| --- | --- | --- |")
    for size in SIZES:
        print(f"| {size} | {errors[7, size]:.2%} | {errors[19, size]:.2%} |")


if __name__ == "__main__":
    main()
