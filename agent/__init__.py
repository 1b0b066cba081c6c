"""The assistant people talk to: the OpenAI-compatible API and the chat page."""
