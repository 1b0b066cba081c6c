"""The ground floor: settings, database, Kafka, events, the engine client, and the command root."""
