"""ProDA: prototypes that follow the target rectify the labels of the warm-up (arXiv 2101.10979).

    python examples/methods/proda.py --source DIR --target DIR --classes FILE --output runs/proda

Zhang et al., "Prototypical Pseudo Label Denoising and Target Structure Learning for Domain Adaptive
Semantic Segmentation", CVPR 2021. A stage holds fixed the soft labels of the network that it starts
from. Prototypes are moving averages of the target's features, as a moving-average network sees
them; the soft assignment of a feature to them reweighs the fixed soft label.

Not as in the paper: the averages move faster, as a run has hundreds of iterations, not 80,000; and
its stages 2 and 3, which distill into a network with self-supervised weights, are left out.
"""

import copy

import torch
from steps import feature_dim, moving_average, source_loss
from torch import Tensor, nn

import anchorda
from image_folders import Batch, Data
from segmentation import Objective, Options, crop, distort, main

TEMPERATURE = 1.0  # τ of equation 5
ALPHA, BETA = 0.1, 1.0  # of the symmetric cross-entropy, equation 6
CONSISTENCY, REGULARIZER = 10.0, 0.1  # γ₁ and γ₂ of equation 10
TEACHER_DECAY = 0.99  # 0.9999 in the paper
PROTOTYPE_MOMENTUM = 0.01  # 1 − λ of equation 7; 0.0001 in the paper
MIN_PIXELS = 10  # of a class in an image, for its mean feature to count


@torch.no_grad()
def target_prototypes(network: nn.Module, data: Data, options: Options) -> anchorda.CategoryAnchors:
    """Return the means of the target's features by predicted class (equation 3)."""
    dim, num_classes = feature_dim(network, data, options), len(data.classes)
    exact = anchorda.CategoryAnchors(num_classes, dim).to(options.device)
    for images, _ in data.target.batches(options.batch, options.device):
        features, logits = network(images)
        exact.update(features, logits.argmax(dim=1))
    moving = anchorda.CategoryAnchors(num_classes, dim, momentum=PROTOTYPE_MOMENTUM)
    moving.to(options.device).update_sums(*exact_sums(exact))
    return moving


def exact_sums(anchors: anchorda.CategoryAnchors) -> anchorda.ClassSums:
    """Return the sums behind a mean: the first batch of a moving average is taken whole."""
    sums = anchors.compute().nan_to_num() * anchors.counts[:, None]
    return anchorda.ClassSums(sums, anchors.counts)


def begin_stage(network: nn.Module, data: Data, options: Options) -> Objective:
    """Return the losses of a stage (equation 10) that starts from a network."""
    num_classes = len(data.classes)
    first = copy.deepcopy(network).eval().requires_grad_(False)
    teacher = moving_average(network, TEACHER_DECAY)
    prototypes = target_prototypes(network, data, options)

    @torch.no_grad()
    def label(target: Tensor) -> tuple[Tensor, Tensor]:
        """Rectify the fixed soft labels by the assignment of the teacher's features."""
        features, logits = teacher(target)
        means = anchorda.image_centroids(
            features, logits.argmax(dim=1), num_classes, min_pixels=MIN_PIXELS
        )
        for image_means, image_labels in zip(*means, strict=True):  # equation 7, image by image
            prototypes.update(image_means.T, image_labels)
        assigned = anchorda.anchor_probabilities(
            features, prototypes.compute(), temperature=TEMPERATURE
        )  # equation 5
        soft = first(target)[1].softmax(dim=1)
        return anchorda.rectify(soft, assigned).argmax(dim=1), assigned  # equation 4

    def objective(network: nn.Module, source: Batch, target: Tensor) -> Tensor:
        teacher.update_parameters(network)
        (images, labels), (weak, _) = crop(*source), crop(target, source[1])
        pseudo, assigned = label(weak)
        features, logits = network(torch.cat([distort(images), weak, distort(weak)]))
        source_logits, weak_logits, _ = logits.chunk(3)
        strong_features = features.chunk(3)[2]

        loss = source_loss(source_logits, labels, data)
        loss = loss + anchorda.symmetric_cross_entropy(weak_logits, pseudo, alpha=ALPHA, beta=BETA)
        # Equation 8. The paper's code averages over pixels and classes.
        consistency = anchorda.anchor_consistency_loss(
            strong_features, assigned, prototypes.compute(), temperature=TEMPERATURE
        )
        # Equation 9: the divergence of the prediction from equal shares, without a constant.
        regularizer: Tensor = -weak_logits.log_softmax(dim=1).mean()
        loss = loss + CONSISTENCY / num_classes * consistency
        return loss + REGULARIZER * regularizer

    return objective


if __name__ == "__main__":
    main(begin_stage=begin_stage)
