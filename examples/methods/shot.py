"""SHOT: adapts features without source data, for a fixed classifier (arXiv 2002.08546).

    python examples/methods/shot.py --source DIR --target DIR --classes FILE --output runs/shot

Liang, Hu and Feng, "Do We Really Need to Access the Source Data?", ICML 2020. After the warm-up no
source image is used: the classifier stays as it is, and the features of the target are moved to
where it is sure of each pixel and gives all classes. Labels of the target come from its own
centroids, computed at the beginning of a stage.

Not as in the paper, which classifies images: pixels of a street have no equal shares, so the weight
of the entropy of the mean prediction is one that maps need to be looked at for.
"""

import copy

import steps  # noqa: F401 # finds the modules of the folder above
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, pad

import anchorda
from image_folders import Batch, Data
from segmentation import Objective, Options, crop, main

LABELS = 0.3  # β of equation 7


def extended(features: Tensor) -> Tensor:
    """Return features with a 1 appended, scaled to length 1, as the paper's code compares them."""
    return normalize(pad(features.movedim(1, -1), (0, 1), value=1.0), dim=-1).movedim(-1, 1)


def assign(features: Tensor, centroids: Tensor) -> Tensor:
    """Return the class of the most similar centroid."""
    return anchorda.anchor_probabilities(extended(features), centroids, similarity="cosine").argmax(
        dim=1
    )


@torch.no_grad()
def target_centroids(network: nn.Module, data: Data, options: Options) -> Tensor:
    """Return the centroids of the target: by probabilities, then by the labels of those."""
    centroids: Tensor | None = None
    for _ in range(2):  # equations 4 and 5, then 6
        total: anchorda.ClassSums | None = None
        for images, _ in data.target.batches(options.batch, options.device):
            features, logits = network(images)
            members = logits.softmax(dim=1)
            if centroids is not None:
                labels = assign(features, centroids)
                members = nn.functional.one_hot(labels, len(data.classes)).movedim(-1, 1).float()
            sums = anchorda.soft_class_sums(extended(features), members)
            total = sums if total is None else anchorda.ClassSums(*map(torch.add, total, sums))
        assert total is not None
        centroids = (total.sums / total.counts[:, None]).float()  # NaN for a class without pixels
    assert centroids is not None
    return centroids


def begin_stage(network: nn.Module, data: Data, options: Options) -> Objective:
    """Return the losses of a stage (equation 7) that starts from a network."""
    frozen = copy.deepcopy(network).eval().requires_grad_(False)
    centroids = target_centroids(frozen, data, options)
    network.get_submodule("classifier").requires_grad_(False)

    def objective(network: nn.Module, source: Batch, target: Tensor) -> Tensor:
        del source
        target, _ = crop(target, target[:, 0].long())
        with torch.no_grad():
            labels = assign(frozen(target)[0], centroids)
        _, logits = network(target)
        loss = anchorda.information_maximization_loss(logits)  # equation 3
        return loss + LABELS * anchorda.discriminative_loss(logits, labels)

    return objective


if __name__ == "__main__":
    main(begin_stage=begin_stage)
