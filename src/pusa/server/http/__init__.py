"""The HTTP API: routes, schemas, request bodies, middleware."""
