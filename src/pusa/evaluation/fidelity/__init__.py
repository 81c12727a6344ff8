"""Measure how faithful a model is to a user's own clips, without any download (``pusa eval fidelity``)."""
