"""``/v1/responses``: OpenAI's newer way to ask, on the same turns and episodes."""
