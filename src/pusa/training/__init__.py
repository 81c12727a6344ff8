"""Training: the recipe of the small model, from drawn clips to a folder that `PusaPipeline.from_pretrained` takes."""
