"""The embedded model: weights, world, recipe, evaluation, the paper in small. The product works without this folder."""
