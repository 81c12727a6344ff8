"""How good a model is: metrics, probes of the small world, and the commands of ``pusa eval``."""
