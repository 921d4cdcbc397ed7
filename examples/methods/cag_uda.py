"""CAG-UDA: category anchors, active target pixels, and two losses (arXiv 1910.13049).

    python examples/methods/cag_uda.py --source DIR --target DIR --classes FILE --output runs/cag

Zhang et al., "Category Anchor-Guided Unsupervised Domain Adaptation for Semantic Segmentation",
NeurIPS 2019. A stage holds fixed the network that it starts from and the anchors of the source. A
target pixel is active where its second-nearest anchor is farther than the nearest by a margin, or
where the classifier is sure; active pixels are classified and pulled to their anchor.

Not as in the paper: the margin is not 2.5, a number for the features of its network, but the one
that labels half of the pixels of each class. `examples/gta5_to_cityscapes` trains at full scale.
"""

import torch
from steps import feature_dim, source_loss
from torch import Tensor, nn

import anchorda
from image_folders import Batch, Data
from segmentation import Objective, Options, crop, distort, main

COVERAGE = 0.5  # of each class's target pixels, in place of the margin of 2.5
PROBABILITY = 0.95  # the minimum of the classifier's labels
DISTANCE_WEIGHT = 0.02  # 0.7 in the released code, for its own form of the distance loss


def freeze(network: nn.Module, data: Data, options: Options) -> anchorda.StageLabeler:
    """Hold fixed the network, the anchors (equation 2) and the margins (equation 4)."""
    num_classes = len(data.classes)
    anchors = anchorda.CategoryAnchors(num_classes, feature_dim(network, data, options))
    source = data.source.batches(options.batch, options.device)
    stage = anchorda.StageLabeler.from_source(network, source, anchors.to(options.device))
    margins = anchorda.ScoreCalibrator(num_classes).to(options.device)
    for images, _ in data.target.batches(options.batch, options.device):
        margins.update(*stage(images).by_anchor)
    stage.by_anchor = anchorda.AnchorPseudoLabeler(margins.min_score_for_coverage(COVERAGE))
    stage.by_probability = anchorda.ProbabilityPseudoLabeler(PROBABILITY)
    return stage


def begin_stage(network: nn.Module, data: Data, options: Options) -> Objective:
    """Return the losses of a stage (equation 7) that starts from a network."""
    stage = freeze(network, data, options)

    def objective(network: nn.Module, source: Batch, target: Tensor) -> Tensor:
        (images, labels), (target, _) = crop(*source), crop(target, source[1])
        pseudo = stage(target)
        features, logits = network(distort(torch.cat([images, target])))
        source_features, target_features = features.chunk(2)
        source_logits, target_logits = logits.chunk(2)

        loss = source_loss(source_logits, labels, data)
        correct = anchorda.resize_labels(labels, features.shape[2:])
        correct = anchorda.keep_correct(correct, source_logits)
        pull = anchorda.anchor_distance_loss(source_features, correct, stage.centroids)
        for kind in (pseudo.by_anchor, pseudo.by_probability):
            # Equation 6, the discriminative loss, and equation 5, the distance to the anchor.
            loss = loss + anchorda.discriminative_loss(target_logits, kind.labels) / 2
            pull = pull + (
                anchorda.anchor_distance_loss(target_features, kind.labels, stage.centroids) / 2
            )
        return loss + DISTANCE_WEIGHT * pull

    return objective


if __name__ == "__main__":
    main(begin_stage=begin_stage)
