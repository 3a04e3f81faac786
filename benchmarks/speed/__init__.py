"""The measurements of `bench.py`, a module for each of its rows."""
