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
from fastxkd.metrics.imputation import linear_imputation
from fastxkd.metrics.inference import (
    Estimate,
    PermutationTest,
    jackknife,
    layer_standard_errors,
    permutation_test,
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
    from fastxkd.metrics.scores import FeatureSimilarityScore, RelevanceScore

__all__ = [
    "ADCC",
    "ROAD",
    "ADCCScores",
    "AverageDrop",
    "AverageIncrease",
    "ConfidenceChange",
    "DeletionAUC",
    "EnergyPointingGame",
    "Estimate",
    "ExplanationAgreement",
    "FeatureSimilarityScore",
    "GridPointingGame",
    "InsertionAUC",
    "LayerScores",
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
    "confidence_change",
    "cosine_agreement",
    "deletion_curve",
    "distance_correlation",
    "energy_pointing_game",
    "grid_pointing_game",
    "image_grids",
    "insertion_curve",
    "jackknife",
    "layer_scores",
    "layer_standard_errors",
    "linear_imputation",
    "partial_distance_correlation",
    "pearson_agreement",
    "permutation_test",
    "pointing_game",
    "projected_width",
    "randomisation_check",
    "relevant_features",
    "relevant_images",
    "road_score",
    "spearman_agreement",
    "ssim_agreement",
    "top_agreement",
]

# The torchmetrics classes, and where they are.
_CLASSES = {
    **dict.fromkeys(("FeatureSimilarityScore", "RelevanceScore"), "scores"),
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
