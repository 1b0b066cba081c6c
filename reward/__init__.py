"""How good an answer is, and how sure we are: the streaming reward model."""

CONSUMER = "reward"  # under which the worker's position in the log is kept
