"""Say of each class of VAEs how it encodes and decodes a video; `pusa.models.vae` uses it."""
