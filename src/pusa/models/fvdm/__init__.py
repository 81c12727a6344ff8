"""Run FVDM: a Latte-style network with one timestep per frame, its checkpoints, and the DDPM it is trained with."""
