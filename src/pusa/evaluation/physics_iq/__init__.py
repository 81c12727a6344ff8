"""Measure a model on Physics-IQ (arXiv 2501.09038): prepare its scenes, compute motion masks, score and report."""
