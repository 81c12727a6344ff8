"""The durable jobs: queue, database, file store, housekeeping."""
