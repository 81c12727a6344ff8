"""Hold the networks of all bases: transformers with a timestep per latent frame, VAEs frame by frame, text encoders."""
