"""The cost of soft assignments, statistics and the losses of other papers, beside plain torch.

    python benchmarks/family.py --output runs/family

Features, repeats, floors and columns are those of ``operators.py``. A contender whose answers
differ from those in float64 is not reported. The table in Markdown goes to the terminal, and
OUTPUT/family.csv has a line for each measurement.
"""

import argparse
from functools import cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from operators import (
    OURS,
    Answer,
    Case,
    Inputs,
    Operator,
    contender_table,
    copy,
    flat,
    machine_columns,
    measure,
    product,
    return_freed_memory,
    save_csv,
    with_gradient,
)
from torch import Tensor

import anchorda

TEMPERATURE = 0.5


@cache
def discriminant_of(anchors: Tensor) -> anchorda.LinearDiscriminant:
    """Return a discriminant, computed in float64; its cost is no part of the labels'."""
    covariance = torch.diag(torch.linspace(0.5, 2.0, anchors.shape[1])).to(anchors)
    return anchorda.linear_discriminant(anchors, covariance)


def logits(inputs: Inputs) -> Answer:
    """Run the public function; the discriminant is computed before."""
    return (discriminant_of(inputs.anchors).logits(inputs.features).flatten(2),)


def logits_by_convolution(inputs: Inputs) -> Answer:
    """Return logits by a 1×1 convolution, the classifier of most networks."""
    weight, bias = discriminant_of(inputs.anchors)
    weight = weight.to(inputs.features)[:, :, None, None]
    return (F.conv2d(inputs.features, weight, bias.to(inputs.features)).flatten(2),)


def probabilities(inputs: Inputs, similarity: str) -> Answer:
    """Run the public function."""
    found = anchorda.anchor_probabilities(
        *(inputs.features, inputs.anchors),
        similarity=similarity,  # type: ignore[arg-type]
        temperature=TEMPERATURE,
    )
    return (found.movedim(1, -1).flatten(0, -2),)


def probabilities_by_torch(inputs: Inputs, similarity: str) -> Answer:
    """Return probabilities by torch.cdist or normalized products, and a softmax."""
    rows, anchors = flat(inputs.features), inputs.anchors
    if similarity == "euclidean":
        scores = -torch.cdist(rows, anchors)
    else:
        scores = F.normalize(rows, dim=1) @ F.normalize(anchors, dim=1).T
    return ((scores / TEMPERATURE).softmax(dim=1),)


def soft_sums(inputs: Inputs) -> Answer:
    """Run the public function, with the products of the anchors as memberships."""
    found = anchorda.soft_class_sums(inputs.features, memberships(inputs))
    return found.sums, found.counts


def soft_sums_by_product(inputs: Inputs) -> Answer:
    """Return sums by one product for each image."""
    p, x = memberships(inputs).flatten(2), inputs.features.flatten(2)
    return (p @ x.mT).sum(dim=0), p.sum(dim=(0, 2))


def memberships(inputs: Inputs) -> Tensor:
    """Return probabilities of the labels, 0.7 for the own class."""
    one_hot = F.one_hot(inputs.labels.clamp(max=len(inputs.anchors)), len(inputs.anchors) + 1)
    return 0.7 * one_hot[..., :-1].movedim(-1, 1).to(inputs.features)


def covariance(inputs: Inputs) -> Answer:
    """Run the public function."""
    state = anchorda.WithinClassCovariance(*inputs.anchors.shape).to(inputs.features.device)
    state.update(inputs.features, inputs.labels)
    return (state.compute(),)


def covariance_by_offsets(inputs: Inputs) -> Answer:
    """Return the covariance from the offsets of the labeled pixels, by boolean indexing."""
    labeled = inputs.labels.flatten() < len(inputs.anchors)
    rows, labels = flat(inputs.features)[labeled], inputs.labels.flatten()[labeled]
    sums = torch.zeros_like(inputs.anchors).index_add(0, labels, rows)
    means = sums / labels.bincount(minlength=len(sums))[:, None]
    offsets = rows - means[labels]
    return (offsets.T @ offsets / len(rows),)


def contrast(features: Tensor, labels: Tensor, anchors: Tensor) -> Tensor:
    """Run the public function."""
    return anchorda.anchor_contrastive_loss(
        features, labels, anchors, similarity="cosine", temperature=TEMPERATURE
    )


def contrast_by_torch(features: Tensor, labels: Tensor, anchors: Tensor) -> Tensor:
    """Return the loss by normalized products and a cross-entropy."""
    scores = F.normalize(flat(features), dim=1) @ F.normalize(anchors, dim=1).T / TEMPERATURE
    targets = labels.flatten().where(labels.flatten() < len(anchors), -100)
    return F.cross_entropy(scores, targets)


def distribution(features: Tensor, labels: Tensor, anchors: Tensor) -> Tensor:
    """Run the public function."""
    return anchorda.anchor_distribution_loss(
        features, labels, anchors, anchors.abs(), temperature=10.0
    )


def distribution_by_torch(features: Tensor, labels: Tensor, anchors: Tensor) -> Tensor:
    """Return the loss by products of all pixels and classes."""
    rows = flat(features)
    linear, squared = rows @ anchors.T / 10, rows.square() @ anchors.abs().T / 200
    targets = labels.flatten()
    active = targets < len(anchors)
    own = linear.gather(1, targets.where(active, 0)[:, None]).squeeze(1)
    losses = (linear + squared).logsumexp(dim=1) - own
    return torch.where(active, losses, 0.0).sum() / active.sum()


def distance_to_map(features: Tensor, labels: Tensor, anchors: Tensor) -> Tensor:
    """Run the public function."""
    return anchorda.feature_distance_loss(features, features.detach().flip(0))


def distance_to_map_by_torch(features: Tensor, labels: Tensor, anchors: Tensor) -> Tensor:
    """Return the loss by offsets of all pixels."""
    distances: Tensor = (features - features.detach().flip(0)).norm(dim=1)
    return distances.mean()


FAMILY = {
    "logits of a discriminant": Operator(
        *("product", product, logits_by_convolution),
        {OURS: logits, "1×1 convolution": logits_by_convolution},
    ),
    **{
        f"probabilities, {kind}": Operator(
            *("product", product, partial(probabilities_by_torch, similarity=kind)),
            {
                OURS: partial(probabilities, similarity=kind),
                "plain torch": partial(probabilities_by_torch, similarity=kind),
            },
        )
        for kind in ("euclidean", "cosine")
    },
    "soft class sums": Operator(
        *("product", product, soft_sums_by_product),
        {OURS: soft_sums, "plain torch": soft_sums_by_product},
    ),
    "covariance": Operator(
        *("product", product, covariance_by_offsets),
        {OURS: covariance, "plain torch": covariance_by_offsets},
    ),
    **{
        name: Operator(
            *("copy", copy, partial(with_gradient, plain)),
            {OURS: partial(with_gradient, ours), "plain torch": partial(with_gradient, plain)},
        )
        for name, ours, plain in (
            ("contrastive loss, cosine", contrast, contrast_by_torch),
            ("distribution loss", distribution, distribution_by_torch),
            ("feature distance loss", distance_to_map, distance_to_map_by_torch),
        )
    },
}


def main() -> None:
    """Print the table, and write what it was made from."""
    parser = argparse.ArgumentParser(description="What the wider family of blocks costs.")
    parser.add_argument("--output", type=Path, default=Path("runs/family"))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--pixels", type=int, nargs=3, default=(2, 128, 224), metavar="N H W")
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    where = machine_columns(options.device)
    return_freed_memory()
    print(", ".join(f"{key} {value}" for key, value in where.items()) + "\n", flush=True)
    rows = []
    for name, operator in FAMILY.items():
        rows += measure(
            name, operator, Case(tuple(options.pixels)), options.device, options.repeats
        )
    print(contender_table(rows))
    save_csv(options.output / "family.csv", {"family": rows}, where)


if __name__ == "__main__":
    main()
