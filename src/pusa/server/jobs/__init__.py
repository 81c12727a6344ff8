"""Store jobs durably: queue, database, file store, housekeeping."""
