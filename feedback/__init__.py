"""What happened, and what people said of it: episodes and signals."""
