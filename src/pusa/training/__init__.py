"""Vectorised timestep adaptation (VTA): train an adapter, or a whole transformer."""
