"""Report on a training run: metrics, curves, validation videos and a model card."""

from pusa.training.reports.metrics import METRICS_FILE, Reporter, check_tracker, read_metrics

__all__ = ["METRICS_FILE", "Reporter", "check_tracker", "read_metrics"]
