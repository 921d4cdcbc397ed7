"""Class anchors for domain adaptation: centroids, pseudo-labels by distance to them, and losses."""

from .anchors import (
    CategoryAnchors,
    ClassSums,
    class_sums,
    image_centroids,
    keep_correct,
    resize_labels,
)
from .evaluation import ConfusionMatrix, PseudoLabelQuality
from .losses import (
    AnchorContrastiveLoss,
    AnchorDistanceLoss,
    DiscriminativeLoss,
    anchor_contrastive_loss,
    anchor_distance_loss,
    discriminative_loss,
)
from .pseudo_labels import (
    AnchorPseudoLabeler,
    ProbabilityPseudoLabeler,
    PseudoLabels,
    anchor_distances,
    combine_pseudo_labels,
)

__version__ = "0.1.0.dev0"

__all__ = [
    "AnchorContrastiveLoss",
    "AnchorDistanceLoss",
    "AnchorPseudoLabeler",
    "CategoryAnchors",
    "ClassSums",
    "ConfusionMatrix",
    "DiscriminativeLoss",
    "ProbabilityPseudoLabeler",
    "PseudoLabelQuality",
    "PseudoLabels",
    "anchor_contrastive_loss",
    "anchor_distance_loss",
    "anchor_distances",
    "class_sums",
    "combine_pseudo_labels",
    "discriminative_loss",
    "image_centroids",
    "keep_correct",
    "resize_labels",
]
