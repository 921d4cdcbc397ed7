"""DiGA: labels on which classifier and nearest centroid agree (arXiv 2304.02222).

    python examples/methods/diga.py --source DIR --target DIR --classes FILE --output runs/diga

Shen et al., "DiGA: Distil to Generalize and then Adapt for Domain Adaptive Semantic Segmentation",
CVPR 2023, its second step. A stage holds fixed the labels of the network that it starts from. A
label is used where the nearest centroid of the teacher's feature agrees, with no threshold.
Centroids are moving averages of the features of both domains.

Not as in the paper: its first step, the distillation of the warm-up, is left out, and the averages
move faster, as a run has hundreds of iterations.
"""

import copy

import torch
from steps import at_size, feature_dim, moving_average, source_loss
from torch import Tensor, nn

import anchorda
from image_folders import Batch, Data
from segmentation import Objective, Options, crop, distort, main, mix

TEACHER_DECAY = 0.99
CENTROID_MOMENTUM = 0.01  # 0.0001 in the paper
MIN_PIXELS = 5  # of a class in an image, for its mean feature to count


def begin_stage(network: nn.Module, data: Data, options: Options) -> Objective:
    """Return the losses of a stage that starts from a network."""
    num_classes, dim = len(data.classes), feature_dim(network, data, options)
    first = copy.deepcopy(network).eval().requires_grad_(False)
    teacher = moving_average(network, TEACHER_DECAY)
    centroids = anchorda.CategoryAnchors(num_classes, dim, momentum=CENTROID_MOMENTUM)
    centroids.to(options.device)
    nearest = anchorda.AnchorPseudoLabeler(float("-inf")).to(options.device)

    def follow(features: Tensor, labels: Tensor) -> None:
        """Move the centroids by the mean feature of each image and class."""
        means = anchorda.image_centroids(features, labels, num_classes, min_pixels=MIN_PIXELS)
        for image_means, image_labels in zip(*means, strict=True):
            centroids.update(image_means.T, image_labels)

    @torch.no_grad()
    def label(images: Tensor, labels: Tensor, target: Tensor) -> Tensor:
        """Return the fixed labels where the nearest centroid agrees."""
        features, _ = teacher(images)
        follow(features, anchorda.resize_labels(labels, features.shape[2:]))
        features, _ = teacher(target)
        stored = first(target)[1]
        follow(features, stored.argmax(dim=1))
        features, stored = (at_size(maps, target.shape[2:]) for maps in (features, stored))
        by_centroid = nearest(features, centroids.compute()).labels
        return anchorda.combine_pseudo_labels(stored.argmax(dim=1), by_centroid, "agree")

    def objective(network: nn.Module, source: Batch, target: Tensor) -> Tensor:
        teacher.update_parameters(network)
        (images, labels), (target, _) = crop(*source), crop(target, source[1])
        pseudo = label(images, labels, target)
        mixed, mixed_labels = mix((images, labels), (target, pseudo), num_classes // 2)
        _, logits = network(distort(torch.cat([images, mixed])))
        source_logits, mixed_logits = logits.chunk(2)
        loss = source_loss(source_logits, labels, data)
        return loss + anchorda.discriminative_loss(
            at_size(mixed_logits, mixed.shape[2:]), mixed_labels
        )

    return objective


if __name__ == "__main__":
    main(begin_stage=begin_stage)
