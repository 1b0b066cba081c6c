"""A cluster that asks who one is: its options reach every client, and take nothing that the loop relies on."""

import threading

import pytest

from feedback.projection import HANDLERS
from infra import kafka
from infra.log import relay
from infra.log.consumer import Consumer
from infra.log.relay import Relay
from infra.settings import Settings

SECRET = "s3cret"
OPTIONS = {"security_protocol": "SASL_SSL", "sasl_mechanism": "PLAIN", "sasl_plain_password": SECRET, "acks": 0}


@pytest.fixture
def clients(monkeypatch):
    """What each client of the library was made with; none is."""
    made = {}

    def record(name):
        def make(**options):
            made[name] = options
            raise kafka.KafkaError

        return make

    for name in ("KafkaAdminClient", "KafkaProducer", "KafkaConsumer"):
        monkeypatch.setattr(kafka, name, record(name))
    return made


@pytest.fixture
def settings(tmp_path):
    options = {name: value for name, value in OPTIONS.items() if name != "acks"}
    return Settings(home=tmp_path, kafka_bootstrap="kafka:9092", kafka_options=options, kafka_replicas=3)


def test_relay_and_consumers_say_who_they_are(clients, settings):
    relay = Relay(None, settings)
    with pytest.raises(kafka.KafkaError):
        relay.check_memory(None)
    relay.check_memory = lambda connection: None
    with pytest.raises(kafka.KafkaError):
        relay.connect(None)
    consumer = Consumer("receipts", None, settings, HANDLERS)
    with pytest.raises(kafka.KafkaError):
        consumer._consume(threading.Event())
    assert set(clients) == {"KafkaAdminClient", "KafkaProducer", "KafkaConsumer"}
    for made in clients.values():
        assert made["sasl_plain_password"] == SECRET and made["bootstrap_servers"] == "kafka:9092"
    assert clients["KafkaProducer"]["acks"] == "all"


def test_what_the_loop_relies_on_cannot_be_taken_away(clients):
    with pytest.raises(TypeError, match="acks"):
        kafka.producer("kafka:9092", OPTIONS)


def test_the_password_is_shown_nowhere(settings):
    assert SECRET not in repr(settings) and SECRET not in str(settings)


def test_topics_are_made_with_as_many_copies_as_are_set(settings, monkeypatch):
    made = []

    class Admin:
        def __init__(self, **options):
            self.options = options

        def list_topics(self):
            return []

        def create_topics(self, topics):
            made.extend(topics)

        def describe_topics(self, names):
            return [{"name": name, "topic_id": "id"} for name in names]

        def close(self):
            pass

    monkeypatch.setattr(kafka, "KafkaAdminClient", Admin)
    kafka.ensure_topics("kafka:9092", 12, 30.0, settings.kafka_replicas, settings.kafka_options)
    assert made and {(topic.num_partitions, topic.replication_factor) for topic in made} == {(12, 3)}


def test_a_relay_that_finds_the_broker_without_memory_makes_its_producer_anew(monkeypatch):
    """A broker that has forgotten all does not know the producer either: its next batch would hang."""
    looks = []
    monkeypatch.setattr(relay, "MEMORY_CHECK_S", 0.0)
    monkeypatch.setattr(Relay, "connect", lambda self, connection: None)
    monkeypatch.setattr(Relay, "publish_batch", lambda self, connection: 0)
    monkeypatch.setattr(Relay, "check_memory", lambda self, connection: looks.append(1) or len(looks) == 2)
    found = Relay(None, Settings(home="/nowhere", kafka_bootstrap="nowhere:9092"))
    stop = threading.Event()
    pump = threading.Thread(target=found._pump, args=(None, stop), daemon=True)
    pump.start()
    pump.join(3)
    stop.set()
    assert len(looks) == 2
