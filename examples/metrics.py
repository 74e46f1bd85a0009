"""
How good are the predictions? `evaluate.Metric` classes that need no network, unlike those `evaluate.load` fetches.

Classification takes predicted and true classes. Language modelling takes, for each text, the sum of -ln p over its
predicted tokens and what that sum is divided by: the number of those tokens (perplexity) or of their bytes in UTF-8
(bits per byte).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import datasets
import evaluate
from sklearn.metrics import f1_score, matthews_corrcoef


class _Metric(evaluate.Metric):
    formula: str
    prediction_type: str
    reference_type: str

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.formula,
            citation="",
            inputs_description="predictions and references, one value for each text",
            features=datasets.Features(
                predictions=datasets.Value(self.prediction_type), references=datasets.Value(self.reference_type)
            ),
        )


class _Classification(_Metric):
    prediction_type = reference_type = "int64"


class Accuracy(_Classification):
    """The share of texts whose class is right."""

    formula = "mean(prediction == reference)"

    def _compute(self, predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
        right = sum(int(a) == int(b) for a, b in zip(predictions, references, strict=True))
        return {"accuracy": right / len(references)}


class MacroF1(_Classification):
    """The mean over classes of the harmonic mean of precision and recall; a class never predicted counts 0."""

    formula = "mean over classes of 2 precision recall / (precision + recall)"

    def _compute(self, predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
        return {"macro_f1": float(f1_score(references, predictions, average="macro", zero_division=0))}


class Matthews(_Classification):
    """The correlation of predicted and true classes: 0 for guessing, 1 when all is right."""

    formula = "covariance(prediction, reference) / sqrt(variance(prediction) variance(reference))"

    def _compute(self, predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
        return {"matthews": float(matthews_corrcoef(references, predictions))}


class _Likelihood(_Metric):
    prediction_type, reference_type = "float64", "int64"


class Perplexity(_Likelihood):
    """exp(sum of -ln p over all predicted tokens / their number); infinite where that overflows."""

    formula = "exp(sum(predictions) / sum(references))"

    def _compute(self, predictions: Sequence[float], references: Sequence[int]) -> dict[str, float]:
        mean = math.fsum(predictions) / sum(references)
        return {"perplexity": math.exp(mean) if mean < 700 else math.inf}


class BitsPerByte(_Likelihood):
    """sum of -log2 p over all predicted tokens / their bytes: comparable between vocabularies."""

    formula = "sum(predictions) / (ln(2) sum(references))"

    def _compute(self, predictions: Sequence[float], references: Sequence[int]) -> dict[str, float]:
        return {"bits_per_byte": math.fsum(predictions) / (math.log(2) * sum(references))}


def classification_scores(predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
    """Accuracy, macro-F1 and Matthews correlation."""
    return _merged((Accuracy(), MacroF1(), Matthews()), predictions, references)


def likelihood_scores(nll: Sequence[float], tokens: Sequence[int], n_bytes: Sequence[int] | None) -> dict[str, float]:
    """Perplexity and, where the bytes are given, bits per byte."""
    scores = _merged((Perplexity(),), nll, tokens)
    return scores | (_merged((BitsPerByte(),), nll, n_bytes) if n_bytes is not None else {})


def _merged(metrics: Sequence[evaluate.Metric], predictions: Sequence, references: Sequence) -> dict[str, float]:
    scores: dict[str, float] = {}
    for metric in metrics:
        scores |= metric.compute(predictions=predictions, references=references)
    return scores
