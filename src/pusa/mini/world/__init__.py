"""Draw the small world of captioned clips that trains the embedded model."""
