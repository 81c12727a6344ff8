"""The models: Wan's transformer with one timestep per latent frame, Wan's VAE frame by frame."""
