"""Provide the embedded model: weights, world, recipe, evaluation, paper in small. The product works without it."""
