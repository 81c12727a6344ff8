"""Train a text-to-video model with one time per latent frame: vectorised timestep adaptation (VTA)."""
