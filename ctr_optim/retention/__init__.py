"""Retention: statistics of retained text, and the coordinates in which an adapter learns without forgetting."""

from __future__ import annotations

from ctr_optim.retention.metric import Metric, metric_of
from ctr_optim.retention.samples import own_samples, random_tokens
from ctr_optim.retention.statistics import Retention, Statistics

__all__ = ["Metric", "Retention", "Statistics", "metric_of", "own_samples", "random_tokens"]
