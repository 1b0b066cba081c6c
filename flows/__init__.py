"""When things happen: the night run, the canary watch, the demo. No logic of its own."""
