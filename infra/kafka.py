"""Kafka clients with the settings that the loop relies on (acks=all, idempotent, manual positions)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer, TopicPartition
from kafka.admin import NewTopic
from kafka.errors import KafkaError, TopicAlreadyExistsError, UnknownTopicOrPartitionError

from infra.events import TOPICS, dead_letter_topic

__all__ = ["KafkaError", "TopicPartition", "beginnings", "consumer", "ensure_topics", "partitions", "producer"]

REQUEST_TIMEOUT_MS = 10_000
MAX_EVENT_BYTES = 8 * 1024**2


def ensure_topics(
    bootstrap: str,
    num_partitions: int,
    retention_days: float,
    num_replicas: int = 1,
    options: Mapping[str, Any] | None = None,
) -> dict[str, str | None]:
    """Create the loop's topics and their dead-letter topics where they are missing; return the id of each.

    Kafka keeps events as long as the outbox does: what it dropped sooner would have to be sent again.

    A topic that was deleted and made anew has another id (brokers before Kafka 2.8 give none).
    """
    configs = {"retention.ms": str(int(retention_days * 86_400_000))}
    names = [name for topic in TOPICS for name in (topic, dead_letter_topic(topic))]
    admin = KafkaAdminClient(**(options or {}), bootstrap_servers=bootstrap, request_timeout_ms=REQUEST_TIMEOUT_MS)
    try:
        for name in set(names).difference(admin.list_topics()):
            try:
                admin.create_topics([NewTopic(name, num_partitions, num_replicas, topic_configs=configs)])
            except TopicAlreadyExistsError:
                pass
        return {topic["name"]: topic["topic_id"] for topic in admin.describe_topics(names)}
    finally:
        admin.close()


def topic_names(bootstrap: str, timeout_s: float, options: Mapping[str, Any] | None = None) -> set[str]:
    """Return the topics that a cluster has.

    Raises
    ------
    KafkaError
        It does not answer in time.
    """
    timeout_ms = int(timeout_s * 1000)
    admin = KafkaAdminClient(
        **(options or {}),
        bootstrap_servers=bootstrap,
        request_timeout_ms=timeout_ms,
        bootstrap_timeout_ms=timeout_ms,
    )
    try:
        return set(admin.list_topics())
    finally:
        admin.close()


def producer(bootstrap: str, options: Mapping[str, Any] | None = None) -> KafkaProducer:
    """Return an idempotent producer that waits for all replicas."""
    return KafkaProducer(
        **(options or {}),
        bootstrap_servers=bootstrap,
        acks="all",
        enable_idempotence=True,
        linger_ms=2,
        batch_size=128 * 1024,
        max_request_size=MAX_EVENT_BYTES,
        max_block_ms=REQUEST_TIMEOUT_MS,
        request_timeout_ms=REQUEST_TIMEOUT_MS,
        delivery_timeout_ms=2 * REQUEST_TIMEOUT_MS,
    )


def consumer(bootstrap: str, options: Mapping[str, Any] | None = None) -> KafkaConsumer:
    """Return a consumer without a group: positions are kept in the database beside their effect."""
    return KafkaConsumer(
        **(options or {}),
        bootstrap_servers=bootstrap,
        group_id=None,
        enable_auto_commit=False,
        auto_offset_reset="earliest",
        allow_auto_create_topics=False,  # the relay makes them, with the number of partitions that was asked for
        fetch_max_wait_ms=100,
        request_timeout_ms=REQUEST_TIMEOUT_MS,
    )


def partitions(client: KafkaConsumer, topics: Iterable[str]) -> list[TopicPartition]:
    """Return the partitions of `topics` that exist now."""
    return [TopicPartition(topic, p) for topic in topics for p in sorted(client.partitions_for_topic(topic) or ())]


def beginnings(client: KafkaConsumer, wanted: Iterable[TopicPartition]) -> dict[TopicPartition, int]:
    """Return the first offset that the broker has of each partition.

    Raises
    ------
    KafkaError
        A partition is gone: its topic was made anew with fewer of them. The client's own error is a ``KeyError``.
    """
    try:
        return dict(client.beginning_offsets(list(wanted)))
    except KeyError as error:
        raise UnknownTopicOrPartitionError(str(error)) from error
