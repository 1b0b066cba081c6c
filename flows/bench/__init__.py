"""Benches: each starts what it measures, in a place of its own, and prints what it compared with."""
