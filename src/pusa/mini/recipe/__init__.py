"""Train the embedded model: VAE, text-to-video base, vectorised timestep adaptation."""
