"""Tests: unit (pure), integration (real parts), faults, e2e (a browser), learning (seeded)."""
