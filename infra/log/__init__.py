"""The log: outbox, relay, consumers, dead letters, retention. Kafka carries it; PostgreSQL keeps it."""
