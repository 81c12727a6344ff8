"""Repeat an evaluation over a grid of settings, as one job that can be resumed (``pusa eval sweep``)."""
