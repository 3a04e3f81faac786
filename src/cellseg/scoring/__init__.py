"""How good predictions are, and what is reported of it."""
