"""Measure the quality of generated videos."""
