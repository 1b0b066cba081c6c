"""The fleet's choice among replicas, retries, breakers and discovery, on engines that are an HTTP transport."""

import asyncio
import json
from collections import Counter

import httpx
import pytest

from infra.breaker import FAILURES_TO_OPEN, LONGEST_PAUSE_S, Breaker
from infra.errors import EverloopError, InvalidRequestError, UnavailableError
from infra.fleet import AFFINITY_REQUESTS, Fleet, Replica, addresses
from infra.settings import Settings

URLS = ("http://one", "http://two", "http://three")


def chunk(**choice):
    return {"choices": [{"delta": {}, "finish_reason": None, **choice}]}


WHOLE = [
    chunk(delta={"role": "assistant", "content": ""}),
    chunk(delta={"content": "Hi"}),
    chunk(finish_reason="stop"),
]


def stream(chunks, done=True):
    lines = [f"data: {json.dumps(one)}\n\n" for one in chunks] + (["data: [DONE]\n\n"] if done else [])
    return httpx.Response(200, content="".join(lines).encode())


class Engines:
    """Engines behind one transport: each answers as it is told to."""

    def __init__(self, tmp_path, routes=None, **settings):
        self.asked = []
        self.answers = {}
        self.busy = dict.fromkeys(URLS, 0)
        routes = dict.fromkeys(URLS, "r1") if routes is None else routes
        options = {"engine_url": URLS[0], "engine_replicas": URLS[1:], "home": tmp_path, **settings}
        self.fleet = Fleet(Settings(**options), lambda release: routes)
        for url in URLS:
            replica = Replica(url, None, 5.0)
            replica.client._http = httpx.AsyncClient(base_url=url, transport=httpx.MockTransport(self.handle))
            self.fleet.replicas[url] = replica

    def handle(self, request):
        url = f"http://{request.url.host}"
        if request.url.path == "/metrics":
            if self.busy[url] is None:
                raise httpx.ConnectError("refused")
            return httpx.Response(200, text=f'vllm:num_requests_running{{a="b"}} {self.busy[url]}\n')
        self.asked.append((url, json.loads(request.content)["model"]))
        answer = self.answers.get(url, WHOLE)
        if isinstance(answer, Exception):
            raise answer
        return (
            answer
            if isinstance(answer, httpx.Response)
            else stream(*(answer if isinstance(answer, tuple) else (answer,)))
        )

    def ask(self, **options):
        async def read():
            async with self.fleet.stream_chat("r1", {"messages": []}, **options) as chunks:
                return [one async for one in chunks]

        return asyncio.run(read())


@pytest.fixture
def engines(tmp_path):
    return Engines(tmp_path)


def refused(engines, **options):
    with pytest.raises(EverloopError) as error:
        engines.ask(**options)
    return error.value.code


def test_the_one_with_least_to_do_is_asked_by_what_it_calls_the_release(tmp_path):
    engines = Engines(tmp_path, routes={URLS[1]: "r1~2", URLS[2]: "r1"})
    engines.busy = {URLS[0]: 0, URLS[1]: 3, URLS[2]: 5}
    asyncio.run(look(engines))
    assert engines.ask() == WHOLE
    assert engines.asked == [(URLS[1], "r1~2")]


async def look(engines):
    await asyncio.gather(*(replica.look() for replica in engines.fleet.replicas.values()))


def test_users_stay_with_their_replica_unless_it_has_much_more_to_do(engines):
    homes = {}
    for user in map(str, range(60)):
        engines.ask(affinity=user)
        homes[user] = engines.asked[-1][0]
        engines.ask(affinity=user)
        assert engines.asked[-1][0] == homes[user]
    assert set(Counter(homes.values())) == set(URLS)
    home = homes["7"]
    engines.fleet.replicas[home].num_others = AFFINITY_REQUESTS
    engines.ask(affinity="7")
    assert engines.asked[-1][0] == home
    engines.fleet.replicas[home].num_others += 1
    engines.ask(affinity="7")
    assert engines.asked[-1][0] != home
    del engines.fleet.replicas[home]
    for user, was in homes.items():  # those of the others stay where they were
        if was != home:
            engines.ask(affinity=user)
            assert engines.asked[-1][0] == was


@pytest.mark.parametrize(
    "failure",
    [
        httpx.ConnectError("refused"),
        httpx.Response(500, text="failing"),
        httpx.Response(404, json={"error": {"message": "no such model"}}),
        [],
        (WHOLE[:1], False),
        [*WHOLE[:1], {"error": {"message": "out of memory"}}],
    ],
)
def test_until_something_is_seen_of_the_answer_another_is_tried(engines, failure):
    first = engines.fleet._ranked(dict.fromkeys(URLS, "r1"), "ada")[0].url
    engines.answers[first] = failure
    assert engines.ask(affinity="ada") == WHOLE
    assert len(engines.asked) == 2 and engines.asked[0][0] == first


ANSWER = {"message": {"role": "assistant", "content": "Hi"}, "token_ids": [7], "finish_reason": "stop"}


def at_once(answer):
    return httpx.Response(200, json=answer)


@pytest.mark.parametrize(
    "failure", [httpx.ReadError("gone"), httpx.Response(500, text="failing"), at_once({}), at_once({"choices": []})]
)
def test_a_whole_answer_comes_in_one_chunk_and_another_is_tried_until_it_comes(engines, failure):
    for url in URLS:
        engines.answers[url] = at_once({"choices": [ANSWER], "usage": {"prompt_tokens": 3}})
    first = engines.fleet._ranked(dict.fromkeys(URLS, "r1"), "ada")[0].url
    engines.answers[first] = failure
    [chunk] = engines.ask(affinity="ada", at_once=True)
    assert chunk["choices"][0]["delta"]["content"] == "Hi" and chunk["usage"] == {"prompt_tokens": 3}
    assert len(engines.asked) == 2 and engines.asked[0][0] == first
    assert all(replica.client.num_streams == 0 for replica in engines.fleet.replicas.values())


def test_after_that_it_is_not_asked_twice(engines):
    for url in URLS:
        engines.answers[url] = [*WHOLE[:2], {"error": {"message": "out of memory"}}]
    assert refused(engines) == "engine_failed" and len(engines.asked) == 1


def test_a_wrong_request_is_wrong_everywhere(engines):
    for url in URLS:
        engines.answers[url] = httpx.Response(400, json={"error": {"message": "maximum model length"}})
    with pytest.raises(InvalidRequestError):
        engines.ask()
    assert len(engines.asked) == 1


def test_with_all_away_it_says_so(engines):
    for url in URLS:
        engines.answers[url] = httpx.ConnectError("refused")
    assert refused(engines) == "engine_unavailable" and len(engines.asked) == 3
    engines.busy = dict.fromkeys(URLS)
    asyncio.run(look(engines))
    assert refused(engines) == "engine_unavailable" and len(engines.asked) == 3


def test_nobody_is_asked_who_has_not_proved_the_release(tmp_path):
    engines = Engines(tmp_path, routes={})
    assert refused(engines) == "release_loading" and not engines.asked
    engines.busy = dict.fromkeys(URLS)
    asyncio.run(look(engines))
    assert refused(engines) == "engine_unavailable"
    engines.busy[URLS[1]] = 0
    asyncio.run(look(engines))
    assert refused(engines, routes={URLS[0]: "run/x@1"}) == "release_loading"


def test_a_release_that_was_proved_a_moment_ago_is_found(engines):
    proved = {}
    engines.fleet.routes = lambda release: proved
    engines.fleet.refresh = lambda: proved.update({URLS[1]: "r1"})
    assert engines.ask() == WHOLE and engines.asked == [(URLS[1], "r1")]


def test_one_that_is_away_is_left_out_until_it_answers_again(engines):
    engines.busy[URLS[0]] = None
    asyncio.run(look(engines))
    for number in range(20):
        engines.ask(affinity=str(number))
    assert URLS[0] not in {url for url, _ in engines.asked}
    engines.busy[URLS[0]] = 0
    asyncio.run(look(engines))
    for number in range(20):
        engines.ask(affinity=str(number))
    assert URLS[0] in {url for url, _ in engines.asked}


def test_one_that_fails_again_and_again_is_left_alone_and_then_tried_once(engines):
    now_s = [0.0]
    bad = engines.fleet.replicas[URLS[0]]
    bad.breaker = Breaker(lambda: now_s[0])
    engines.answers[URLS[0]] = httpx.Response(500, text="failing")
    for number in range(60):
        engines.ask(affinity=str(number))
    asked = [url for url, _ in engines.asked].count(URLS[0])
    assert asked == FAILURES_TO_OPEN
    now_s[0] = 1.0
    for number in range(60):
        engines.ask(affinity=str(number))
    assert [url for url, _ in engines.asked].count(URLS[0]) == asked + 1
    del engines.answers[URLS[0]]
    now_s[0] = 3.0
    for number in range(60):
        engines.ask(affinity=str(number))
    assert [url for url, _ in engines.asked].count(URLS[0]) > asked + 5


def test_a_breakers_pauses_double_and_end(monkeypatch):
    now_s = [0.0]
    breaker = Breaker(lambda: now_s[0])
    pauses = []
    for _ in range(12):
        breaker.begin()
        breaker.fail()
        pauses.append(breaker._closed_again_s - now_s[0])
        now_s[0] = max(now_s[0], breaker._closed_again_s)
    now_s[0] -= 1.0
    assert breaker.allows is False
    assert pauses[FAILURES_TO_OPEN - 1 : FAILURES_TO_OPEN + 2] == [1.0, 2.0, 4.0] and pauses[-1] == LONGEST_PAUSE_S
    breaker.succeed()
    assert breaker.allows


def test_of_many_at_once_one_tries_a_replica_that_failed_and_those_under_way_do_not_count_twice():
    now_s = [0.0]
    breaker = Breaker(lambda: now_s[0])
    for _ in range(20):  # all sent before the first failed
        breaker.begin()
    for _ in range(20):
        breaker.fail()
    assert not breaker.allows
    now_s[0] = 1.0
    assert breaker.allows, "twenty at once are one outage"
    breaker.begin()
    assert not breaker.allows, "one tries, the others wait"
    breaker.fail()
    now_s[0] = 2.5
    assert not breaker.allows, "its pause has doubled"
    now_s[0] = 3.0
    breaker.begin()
    breaker.succeed()
    assert breaker.allows


def test_replicas_come_and_go_with_a_host_name(tmp_path, monkeypatch):
    found = [["10.0.0.1", "10.0.0.2"], ["10.0.0.2", "2001:db8::1"], None]

    async def getaddrinfo(self, host, port, **_):
        assert (host, port) == ("engines", 8000)
        now = found.pop(0)
        if now is None:
            raise OSError("no such host")
        return [(0, 0, 0, "", (address, port)) for address in now]

    monkeypatch.setattr("asyncio.base_events.BaseEventLoop.getaddrinfo", getaddrinfo)
    settings = Settings(home=tmp_path, engine_url="http://one/", engine_discovery="http://engines:8000")

    async def follow():
        fleet = Fleet(settings, lambda release: {})
        seen = []
        for _ in range(3):
            await fleet._find()
            seen.append(set(fleet.replicas))
            for replica in fleet.replicas.values():
                if "10.0.0.1" in replica.url:
                    replica.client.num_streams = 1 if len(seen) == 1 else 0
        return seen

    first, second, third = asyncio.run(follow())
    assert first == {"http://one", "http://10.0.0.1:8000", "http://10.0.0.2:8000"}
    assert second == {"http://one", *(f"http://10.0.0.{n}:8000" for n in (1, 2)), "http://[2001:db8::1]:8000"}
    assert third == second - {"http://10.0.0.1:8000"}  # it has ended what it had; the others are still believed
    assert asyncio.run(addresses(settings.model_copy(update={"engine_discovery": None}))) == ["http://one"]


def test_an_error_of_the_fleet_is_one_that_may_be_tried_again(engines):
    with pytest.raises(UnavailableError) as error:
        raise engines.fleet._nobody({})
    assert error.value.status == 503 and error.value.retry_after_s > 0
