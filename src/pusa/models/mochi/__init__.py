"""Hold the base Mochi, of Pusa V0.5."""
