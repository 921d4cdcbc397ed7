"""SePiCo: contrast of every pixel to the distributions of the classes (arXiv 2204.08808).

    python examples/methods/sepico.py --source DIR --target DIR --classes FILE --output runs/sepico

Xie et al., "SePiCo: Semantic-Guided Pixel Contrast for Domain Adaptive Semantic Segmentation",
TPAMI 2023. A teacher, the moving average of the network, labels the target without a threshold;
classes of the source are pasted into it. Means and variances of the classes are those of all source
features that the teacher has seen. Features of source and mixed target are contrasted to them.

Not as in the paper: the features have no projection head, and images are not drawn by rare classes.
"""

import torch
from steps import at_size, feature_dim, moving_average, source_loss
from torch import Tensor, nn
from torch.nn.functional import normalize

import anchorda
from image_folders import Batch, Data
from segmentation import Objective, Options, crop, distort, main, mix

TEACHER_DECAY = 0.99  # 0.999 in the paper, over 40,000 iterations
THRESHOLD = 0.968  # of the probability, for the weight of a batch's labels
TEMPERATURE = 100.0  # τ of equation 11, in the paper's code
CONTRAST = 1.0  # weight of equation 11
MIN_RATIO = 0.75  # of a class in a block of labels, for the block to have a label


def begin_stage(network: nn.Module, data: Data, options: Options) -> Objective:
    """Return the losses of a stage that starts from a network."""
    num_classes, dim = len(data.classes), feature_dim(network, data, options)
    teacher = moving_average(network, TEACHER_DECAY)
    distributions = anchorda.ClassVariances(num_classes, dim).to(options.device)

    def small(labels: Tensor, features: Tensor) -> Tensor:
        return anchorda.resize_labels(
            labels, features.shape[2:], mode="majority", min_ratio=MIN_RATIO
        )

    @torch.no_grad()
    def label(target: Tensor) -> tuple[Tensor, Tensor]:
        """Return the teacher's labels, and the share of sure pixels as their weight."""
        probabilities = at_size(teacher(target)[1], target.shape[2:]).softmax(dim=1)
        scores, labels = probabilities.max(dim=1)
        return labels, (scores >= THRESHOLD).float().mean()

    def objective(network: nn.Module, source: Batch, target: Tensor) -> Tensor:
        teacher.update_parameters(network)
        (images, labels), (target, _) = crop(*source), crop(target, source[1])
        with torch.no_grad():
            features = normalize(teacher(images)[0])
            distributions.update(features, small(labels, features))
        pseudo, share = label(target)
        mixed, mixed_labels = mix((images, labels), (target, pseudo), num_classes // 2)
        # Pasted pixels have true labels; the others weigh as much as the teacher is sure.
        pasted = (mixed != target).any(dim=1)
        weights = torch.where(pasted, 1.0, share)

        features, logits = network(distort(torch.cat([images, mixed])))
        source_logits, mixed_logits = logits.chunk(2)
        loss = source_loss(source_logits, labels, data)
        loss = loss + anchorda.discriminative_loss(
            at_size(mixed_logits, mixed.shape[2:]), mixed_labels, pixel_weights=weights
        )
        moments = distributions.compute()
        contrast = anchorda.anchor_distribution_loss(
            normalize(features),
            small(torch.cat([labels, mixed_labels]), features),
            moments.means,
            moments.variances,
            temperature=TEMPERATURE,
        )
        return loss + CONTRAST * contrast

    return objective


if __name__ == "__main__":
    main(begin_stage=begin_stage)
