"""Try the claims of Pusa V1.0 (arXiv 2507.16116) on the small base model."""
