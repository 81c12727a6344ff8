"""The server: durable jobs, a worker that runs them, an HTTP API and a studio. Importing it loads no torch."""
