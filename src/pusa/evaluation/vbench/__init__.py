"""Measure a model on VBench-I2V: its prompts and images, its totals, and what others have published."""
