"""The small world of captioned clips that the embedded model is trained on."""
