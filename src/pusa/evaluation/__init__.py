"""Evaluation: figures about videos and about samples of figures."""
