"""How good an answer is, and how sure we are: the streaming reward model."""
