"""Class anchors for domain adaptation: centroids, pseudo-labels by distance to them, and losses."""

from . import released as released
from .anchors import (
    CategoryAnchors,
    ClassSums,
    class_sums,
    image_centroids,
    keep_correct,
    resize_labels,
    soft_class_sums,
)
from .calibration import (
    AnchorHealth,
    PrecisionCoverage,
    ScoreCalibrator,
    anchor_health,
    margin_limits,
    warn_unreachable_margins,
)
from .distributed import all_reduce, all_reduce_class_sums
from .evaluation import ConfusionMatrix, PseudoLabelQuality
from .losses import (
    AnchorConsistencyLoss,
    AnchorContrastiveLoss,
    AnchorDistanceLoss,
    AnchorDistributionLoss,
    DiscriminativeLoss,
    FeatureDistanceLoss,
    InformationMaximizationLoss,
    SymmetricCrossEntropyLoss,
    anchor_consistency_loss,
    anchor_contrastive_loss,
    anchor_distance_loss,
    anchor_distribution_loss,
    discriminative_loss,
    feature_distance_loss,
    information_maximization_loss,
    symmetric_cross_entropy,
)
from .pseudo_labels import (
    AnchorPseudoLabeler,
    ProbabilityPseudoLabeler,
    PseudoLabels,
    anchor_distances,
    anchor_probabilities,
    combine_pseudo_labels,
    rectify,
)
from .selection import (
    InformationMaximization,
    LabelAgreement,
    NuclearNorm,
    SoftNeighborhoodDensity,
)
from .stages import StageLabeler, StageLabels
from .statistics import (
    ClassMoments,
    ClassVariances,
    LinearDiscriminant,
    WithinClassCovariance,
    linear_discriminant,
)
from .taps import FeatureTap

__version__ = "0.1.0"

__all__ = [
    "AnchorConsistencyLoss",
    "AnchorContrastiveLoss",
    "AnchorDistanceLoss",
    "AnchorDistributionLoss",
    "AnchorHealth",
    "AnchorPseudoLabeler",
    "CategoryAnchors",
    "ClassMoments",
    "ClassSums",
    "ClassVariances",
    "ConfusionMatrix",
    "DiscriminativeLoss",
    "FeatureDistanceLoss",
    "FeatureTap",
    "InformationMaximization",
    "InformationMaximizationLoss",
    "LabelAgreement",
    "LinearDiscriminant",
    "NuclearNorm",
    "PrecisionCoverage",
    "ProbabilityPseudoLabeler",
    "PseudoLabelQuality",
    "PseudoLabels",
    "ScoreCalibrator",
    "SoftNeighborhoodDensity",
    "StageLabeler",
    "StageLabels",
    "SymmetricCrossEntropyLoss",
    "WithinClassCovariance",
    "all_reduce",
    "all_reduce_class_sums",
    "anchor_consistency_loss",
    "anchor_contrastive_loss",
    "anchor_distance_loss",
    "anchor_distances",
    "anchor_distribution_loss",
    "anchor_health",
    "anchor_probabilities",
    "class_sums",
    "combine_pseudo_labels",
    "discriminative_loss",
    "feature_distance_loss",
    "image_centroids",
    "information_maximization_loss",
    "keep_correct",
    "linear_discriminant",
    "margin_limits",
    "rectify",
    "resize_labels",
    "soft_class_sums",
    "symmetric_cross_entropy",
    "warn_unreachable_margins",
]
