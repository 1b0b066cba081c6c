"""Memory: what an answer is given of what was said before, within a hard budget of tokens."""
