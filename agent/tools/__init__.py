"""Tools under supervision: what the assistant may call, how far it may go by itself, and what comes back."""
