"""``everloop chat`` and ``everloop bench``."""
