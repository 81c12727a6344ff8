"""Serve the HTTP API: routes, schemas, request bodies, middleware."""
