"""Datasets of encoded clips: sources, clips, the folder format, preparation, inspection."""
