"""Similarity of what two models compute, its relevance to the task, and scores of explanations."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fastxkd.metrics.agreement import (
    cosine_agreement,
    pearson_agreement,
    spearman_agreement,
    ssim_agreement,
    top_agreement,
)
from fastxkd.metrics.class_similarity import class_groups, class_similarity, group_entropy
from fastxkd.metrics.concept_scores import Concepts, Dissection
from fastxkd.metrics.dissection import DissectionTally, NetworkDissection, network_dissection
from fastxkd.metrics.fidelity import ExplanationFidelity, explanation_fidelity
from fastxkd.metrics.five_band import (
    FiveBandScores,
    five_band_curve,
    five_band_score,
    five_bands,
)
from fastxkd.metrics.imputation import linear_imputation
from fastxkd.metrics.inference import (
    Estimate,
    PermutationTest,
    jackknife,
    layer_standard_errors,
    permutation_test,
)
from fastxkd.metrics.input_gradients import (
    Alignment,
    gradient_alignment,
    gradient_maps,
    input_gradients,
    kept_pixels,
    ranked_pixels,
    sobel_maps,
)
from fastxkd.metrics.localisation import (
    box_masks,
    energy_pointing_game,
    grid_pointing_game,
    image_grids,
    pointing_game,
)
from fastxkd.metrics.perturbation import (
    ADCCScores,
    ConfidenceChange,
    PerturbationCurve,
    adcc,
    blurred,
    confidence_change,
    deletion_curve,
    insertion_curve,
)
from fastxkd.metrics.projection import RandomProjection, projected_width
from fastxkd.metrics.relevant import relevant_features, relevant_images
from fastxkd.metrics.road import road_score
from fastxkd.metrics.sanity import (
    Randomisation,
    randomisation_check,
)
from fastxkd.metrics.similarity import (
    LayerScores,
    distance_correlation,
    layer_scores,
    partial_distance_correlation,
)
from fastxkd.metrics.unit_thresholds import unit_thresholds

if TYPE_CHECKING:
    from fastxkd.metrics.faithfulness import (
        ADCC,
        ROAD,
        AverageDrop,
        AverageIncrease,
        DeletionAUC,
        EnergyPointingGame,
        ExplanationAgreement,
        GridPointingGame,
        InsertionAUC,
        PointingGame,
        RandomisationCheck,
    )
    from fastxkd.metrics.interpretability import FiveBandScore, GradientAlignment, GroupEntropy
    from fastxkd.metrics.scores import FeatureSimilarityScore, RelevanceScore

__all__ = [
    "ADCC",
    "ROAD",
    "ADCCScores",
    "Alignment",
    "AverageDrop",
    "AverageIncrease",
    "Concepts",
    "ConfidenceChange",
    "DeletionAUC",
    "Dissection",
    "DissectionTally",
    "EnergyPointingGame",
    "Estimate",
    "ExplanationAgreement",
    "ExplanationFidelity",
    "FeatureSimilarityScore",
    "FiveBandScore",
    "FiveBandScores",
    "GradientAlignment",
    "GridPointingGame",
    "GroupEntropy",
    "InsertionAUC",
    "LayerScores",
    "NetworkDissection",
    "PermutationTest",
    "PerturbationCurve",
    "PointingGame",
    "RandomProjection",
    "Randomisation",
    "RandomisationCheck",
    "RelevanceScore",
    "adcc",
    "blurred",
    "box_masks",
    "class_groups",
    "class_similarity",
    "confidence_change",
    "cosine_agreement",
    "deletion_curve",
    "distance_correlation",
    "energy_pointing_game",
    "explanation_fidelity",
    "five_band_curve",
    "five_band_score",
    "five_bands",
    "gradient_alignment",
    "gradient_maps",
    "grid_pointing_game",
    "group_entropy",
    "image_grids",
    "input_gradients",
    "insertion_curve",
    "jackknife",
    "kept_pixels",
    "layer_scores",
    "layer_standard_errors",
    "linear_imputation",
    "network_dissection",
    "partial_distance_correlation",
    "pearson_agreement",
    "permutation_test",
    "pointing_game",
    "projected_width",
    "randomisation_check",
    "ranked_pixels",
    "relevant_features",
    "relevant_images",
    "road_score",
    "sobel_maps",
    "spearman_agreement",
    "ssim_agreement",
    "top_agreement",
    "unit_thresholds",
]

# The torchmetrics classes, and where they are.
_CLASSES = {
    **dict.fromkeys(("FeatureSimilarityScore", "RelevanceScore"), "scores"),
    **dict.fromkeys(("FiveBandScore", "GradientAlignment", "GroupEntropy"), "interpretability"),
    **dict.fromkeys(
        (
            "ADCC",
            "AverageDrop",
            "AverageIncrease",
            "DeletionAUC",
            "EnergyPointingGame",
            "ExplanationAgreement",
            "GridPointingGame",
            "InsertionAUC",
            "PointingGame",
            "ROAD",
            "RandomisationCheck",
        ),
        "faithfulness",
    ),
}


def __getattr__(name: str) -> Any:
    # torchmetrics imports torchvision and more where they are installed: seconds that only the
    # users of the metric classes should pay.
    if name in _CLASSES:
        return getattr(import_module(f"fastxkd.metrics.{_CLASSES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
