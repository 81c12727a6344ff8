"""Measure a model of the small world against known ground truth."""
