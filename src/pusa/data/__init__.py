"""Prepare, synthesize, inspect and read datasets of encoded clips."""
