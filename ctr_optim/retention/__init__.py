"""Retention: statistics of retained text, coordinates that protect its predictions, and a KL budget."""

from __future__ import annotations

from ctr_optim.retention.metric import Metric, metric_of
from ctr_optim.retention.samples import own_samples, random_tokens
from ctr_optim.retention.statistics import Retention, Statistics

__all__ = ["Metric", "Retention", "Statistics", "metric_of", "own_samples", "random_tokens"]
