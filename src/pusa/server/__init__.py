"""Serve video generation: durable jobs, workers, an HTTP API and a studio. Importing it loads no torch."""
