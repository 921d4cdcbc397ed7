"""CPSL: assignments to prototypes with prescribed class shares (arXiv 2203.09744).

    python examples/methods/cpsl.py --source DIR --target DIR --classes FILE --output runs/cpsl

Li et al., "Class-Balanced Pixel-Level Self-Labeling for Domain Adaptive Semantic Segmentation",
CVPR 2022. A stage holds fixed the soft labels of the network that it starts from. The pixels of a
batch are assigned to the prototypes all together, by Sinkhorn's algorithm, so that each class gets
the share that the predictions give it, rare classes included. The assignment rectifies the soft
labels, and a distorted view has to predict it.

Not as in the paper: prototypes are moving averages of the teacher's features; in the paper's code
they are learned. Its sampler that draws rare classes more often is left out.
"""

import copy

import torch
from steps import feature_dim, moving_average, source_loss
from torch import Tensor, nn
from torch.nn.functional import normalize

import anchorda
from image_folders import Batch, Data
from segmentation import Objective, Options, crop, distort, main

EPSILON, ITERATIONS = 0.05, 3  # of Sinkhorn's algorithm, equation 4
TEMPERATURE = 0.08  # τ of equation 5
ALPHA, BETA = 0.1, 1.0  # of the symmetric cross-entropy
SELF_LABELING = 0.1  # weight of equation 5
TEACHER_DECAY = 0.99
PROTOTYPE_MOMENTUM = 0.01
SHARE_MOMENTUM = 0.01  # of the moving average of the classes' shares


def begin_stage(network: nn.Module, data: Data, options: Options) -> Objective:
    """Return the losses of a stage that starts from a network."""
    num_classes, dim = len(data.classes), feature_dim(network, data, options)
    first = copy.deepcopy(network).eval().requires_grad_(False)
    teacher = moving_average(network, TEACHER_DECAY)
    prototypes = anchorda.CategoryAnchors(num_classes, dim, momentum=PROTOTYPE_MOMENTUM)
    prototypes.to(options.device)
    shares = torch.full((num_classes,), 1 / num_classes, device=options.device)

    @torch.no_grad()
    def label(target: Tensor) -> tuple[Tensor, Tensor]:
        """Assign the pixels of a batch, and rectify their fixed soft labels by that."""
        features, logits = teacher(target)
        features, predicted = normalize(features), logits.softmax(dim=1)
        prototypes.update(features, predicted.argmax(dim=1))
        shares.lerp_(predicted.mean(dim=(0, 2, 3)), SHARE_MOMENTUM)
        centers = normalize(prototypes.compute().nan_to_num())
        scores = torch.einsum("ndhw,kd->nhwk", features, centers)
        assigned = anchorda.sinkhorn_assignments(
            scores.flatten(0, 2), shares=shares, epsilon=EPSILON, iterations=ITERATIONS
        )
        assigned = assigned.view(scores.shape).movedim(-1, 1)
        soft = first(target)[1].softmax(dim=1)
        return anchorda.rectify(soft, assigned).argmax(dim=1), assigned

    def objective(network: nn.Module, source: Batch, target: Tensor) -> Tensor:
        teacher.update_parameters(network)
        (images, labels), (weak, _) = crop(*source), crop(target, source[1])
        pseudo, assigned = label(weak)
        features, logits = network(torch.cat([distort(images), weak, distort(weak)]))
        source_logits, weak_logits, _ = logits.chunk(3)
        strong_features = normalize(features.chunk(3)[2])

        loss = source_loss(source_logits, labels, data)
        loss = loss + anchorda.symmetric_cross_entropy(weak_logits, pseudo, alpha=ALPHA, beta=BETA)
        # Equation 5: the distorted view predicts the assignment of the other.
        self_labeling = anchorda.anchor_consistency_loss(
            strong_features,
            assigned,
            prototypes.compute(),
            similarity="cosine",
            temperature=TEMPERATURE,
        )
        return loss + SELF_LABELING * self_labeling

    return objective


if __name__ == "__main__":
    main(begin_stage=begin_stage)
