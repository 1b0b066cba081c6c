"""Which adapter serves whom, and why: registry, attestation, gates, canary, promotion."""
