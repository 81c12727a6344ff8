"""Wan's models: the transformer with a timestep per latent frame, the VAE frame by frame, the text encoder."""
