"""Verifiers, one module each, named as they are: an object ``VERIFIER``."""
