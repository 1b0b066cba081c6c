"""The runs that improve the assistant: snapshots, rollouts, recipes, adapters."""
