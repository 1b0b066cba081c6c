"""Kafka clients with the settings that the loop relies on (acks=all, idempotent, manual positions)."""

from __future__ import annotations

from collections.abc import Iterable

from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer, TopicPartition
from kafka.admin import NewTopic
from kafka.errors import KafkaError, TopicAlreadyExistsError

from infra.events import TOPICS, dead_letter_topic

__all__ = ["KafkaError", "TopicPartition", "assigned_consumer", "ensure_topics", "producer"]

REQUEST_TIMEOUT_MS = 10_000


def ensure_topics(bootstrap: str, num_partitions: int) -> None:
    """Create the loop's topics and their dead-letter topics where they are missing."""
    admin = KafkaAdminClient(bootstrap_servers=bootstrap, request_timeout_ms=REQUEST_TIMEOUT_MS)
    try:
        existing = set(admin.list_topics())
        for topic in TOPICS:
            for name in (topic, dead_letter_topic(topic)):
                if name in existing:
                    continue
                try:
                    admin.create_topics([NewTopic(name, num_partitions, 1)])
                except TopicAlreadyExistsError:
                    pass
    finally:
        admin.close()


def producer(bootstrap: str) -> KafkaProducer:
    """Return an idempotent producer that waits for all replicas."""
    return KafkaProducer(
        bootstrap_servers=bootstrap,
        acks="all",
        enable_idempotence=True,
        linger_ms=2,
        max_block_ms=REQUEST_TIMEOUT_MS,
        request_timeout_ms=REQUEST_TIMEOUT_MS,
        delivery_timeout_ms=2 * REQUEST_TIMEOUT_MS,
    )


def assigned_consumer(bootstrap: str, topics: Iterable[str]) -> KafkaConsumer:
    """Return a consumer of every partition of `topics`, without a group.

    Positions are kept in the database beside their effect, so a group would only add its join delay.
    """
    consumer = KafkaConsumer(
        bootstrap_servers=bootstrap,
        group_id=None,
        enable_auto_commit=False,
        auto_offset_reset="earliest",
        fetch_max_wait_ms=200,
        request_timeout_ms=REQUEST_TIMEOUT_MS,
    )
    partitions = [
        TopicPartition(topic, p) for topic in topics for p in sorted(consumer.partitions_for_topic(topic) or ())
    ]
    consumer.assign(partitions)
    return consumer
