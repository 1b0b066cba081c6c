"""Two real vLLM replicas, one of them behind a proxy that misbehaves: proofs, mending, hot swap, retries."""

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import openai
import pytest
import sqlalchemy as sa
import uvicorn

from agent.app import build_app
from deploy import audit, erasure, head, registry, serving
from deploy.promotion import Operator
from deploy.reconciler import Reconciler
from deploy.tables import Attestation, AuditEntry, Release, Replica, WantedRelease
from feedback.tables import Episode
from flows.bench.adapters import linear_shapes, write_adapter
from infra.connections import SERVER_IDLE_S
from infra.db import connect
from infra.engine import EngineClient
from infra.errors import ConflictError, EverloopError, UnavailableError
from infra.settings import Settings
from tests.conftest import wait_until
from tests.tamper import Engine, Tamper, free_port

PROMPT = [{"role": "user", "content": "Tell me about rivers."}]


class Fleet:
    """Two replicas, their reconciler and a gateway on a database of their own; r1 and r2 are registered."""

    def __init__(self, settings, database, engines, tamper):
        self.settings, self.sessions = settings, database
        self.engines, self.tamper = engines, tamper
        self.first, self.second = engines[0].url, tamper.url
        self.operator = Operator(database, settings, "ann", "203.0.113.7")
        self.stop = threading.Event()

    def start(self, base_model_dir, tmp_path):
        self.shapes, self.tmp_path = linear_shapes(base_model_dir), tmp_path
        self.names = [self.new_release(1), self.new_release(2)]
        self.reconciler = Reconciler(self.sessions, self.settings)
        threading.Thread(target=self.reconciler.run, args=(self.stop,), daemon=True).start()
        port = free_port()
        self.server = uvicorn.Server(
            uvicorn.Config(build_app(self.settings), port=port, log_level="error", timeout_keep_alive=SERVER_IDLE_S)
        )
        threading.Thread(target=self.server.run, daemon=True).start()
        wait_until(lambda: self.server.started, timeout_s=60)
        self.url = f"http://127.0.0.1:{port}"
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="x", max_retries=0, timeout=60)

    def new_release(self, seed):
        """Register an adapter that no replica has met."""
        directory = self.tmp_path / f"adapter-{seed}"
        write_adapter(directory, self.shapes, 16, seed)
        with self.sessions.begin() as session:
            return registry.register(session, self.settings, directory, run_id=f"run_{seed}", manifest={}).name

    def ask(self, user="ann", model="everloop", **options):
        options = {"max_tokens": 12, **options}
        return self.client.chat.completions.create(model=model, messages=PROMPT, user=user, **options)

    def routes(self, release):
        with self.sessions() as session:
            return serving.routes(session).get(release, {})

    def champion(self):
        with self.sessions() as session:
            return head.read(session).champion

    def proved(self, release, *replicas, timeout_s=60):
        wanted = set(replicas or (self.first, self.second))
        wait_until(lambda: wanted <= set(self.routes(release)), timeout_s, f"{release} was not proved")

    async def at_second(self, act):
        async with EngineClient(self.engines[1].url) as engine:
            return await act(engine)

    def reset(self):
        """Put back what a test may have left: both up and honest, the base model champion, nothing to be loaded."""
        self.tamper.mode = "honest"
        if self.engines[1].process.poll() is not None:
            wait_until(lambda: not up(self, self.second), 20, "it was not seen to be down")
            self.engines[1].start()
            self.engines[1].wait()
        self.proved("base")
        wait_until(lambda: up(self, self.second), 20)
        if self.champion() != "base":
            self.operator.promote("base", "begin anew")
        with self.sessions.begin() as session:
            session.execute(sa.delete(WantedRelease))
        wait_until(self.is_settled, 60, "a replica still lacks what is wanted")

    def is_settled(self):
        """Tell whether nothing is left to be loaded: one that misbehaves does so with what its test asks for."""
        with self.sessions() as session:
            return all(serving.is_ready(session, name) for name in serving.wanted(session))


@pytest.fixture(scope="module")
def fleet(base_model_dir, tmp_path_factory, database_url):
    home = tmp_path_factory.mktemp("fleet")
    name = "fleet"
    server = sa.create_engine(database_url.rpartition("/")[0] + "/postgres", isolation_level="AUTOCOMMIT")
    with server.connect() as connection:
        connection.execute(sa.text(f"CREATE DATABASE {name} TEMPLATE everloop"))
    sessions = connect(f"{database_url.rpartition('/')[0]}/{name}", pool_size=8)
    common = {"home": home, "base_model": str(base_model_dir)}
    engines = [
        Engine(
            Settings(**common, engine_port=free_port(), prefect_url="http://unused"), home / f"engine-{number}.log"
        )
        for number in (1, 2)
    ]
    for engine in engines:
        engine.start()
    tamper = Tamper(lambda: engines[1].url, kill=lambda: engines[1].kill())
    tamper.start()
    settings = Settings(
        access="open",
        **common,
        database_url=sessions.kw["bind"].url.render_as_string(hide_password=False),
        engine_url=engines[0].url,
        engine_replicas=(tamper.url,),
        engine_timeout_s=12,
        self_evaluation=False,
    )
    found = Fleet(settings, sessions, engines, tamper)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("deploy.replica.PROVE_AGAIN_S", 2.0)
        patch.setattr("deploy.replica.LOAD_TIMEOUT_S", 8.0)
        patch.setattr("deploy.replica.LONGEST_PAUSE_S", 2.0)
        try:
            for engine in engines:
                engine.wait()
            found.start(base_model_dir, tmp_path_factory.mktemp("adapters"))
            yield found
        finally:
            found.stop.set()
            if hasattr(found, "server"):
                found.server.should_exit = True
            tamper.stop()
            for engine in engines:
                engine.kill()
            time.sleep(1)
            sessions.kw["bind"].dispose()
            server.dispose()


@pytest.fixture
def at_base(fleet):
    fleet.reset()
    return fleet


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr("deploy.serving.READY_TIMEOUT_S", 15.0)


def refused(act, error=UnavailableError):
    with pytest.raises(error) as found:
        act()
    return found.value


def test_each_replica_proves_what_it_serves_and_they_agree(at_base):
    fleet, (one, two) = at_base, at_base.names
    assert fleet.operator.promote(one, "try it") == ("base", one)
    assert fleet.routes(one) == {fleet.first: one, fleet.second: one}
    with fleet.sessions() as session:
        rows = session.scalars(sa.select(Attestation).where(Attestation.release == one)).all()
        assert all(row.differs_from_base > 0.01 for row in rows)
        assert max(row.disagrees or 0.0 for row in rows) < 0.02
        assert session.scalars(sa.select(Release.probe).where(Release.name == one)).one()
        entry = audit.newest(session, 1)[0]
    assert (entry.actor, entry.action, entry.address) == ("ann", "promoted_by_hand", "203.0.113.7")
    assert fleet.ask().model == one
    fleet.operator.promote(two, "the other")
    with fleet.sessions() as session:
        other = session.scalars(sa.select(Attestation.differs_from_others).where(Attestation.release == two)).all()
    assert all(distance > 0.01 for distance in other)
    assert fleet.routes(one), "the champion before stays loaded, to go back to"


def test_users_are_spread_and_stay(at_base):
    fleet = at_base
    fleet.tamper.seen.clear()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: fleet.ask(user=f"user-{number}", max_tokens=2), range(16)))
    assert 2 <= len(fleet.tamper.seen) <= 14


def up(fleet, url):
    with fleet.sessions() as session:
        return session.get_one(Replica, url).is_up


def test_a_lost_adapter_is_loaded_again(at_base):
    fleet, (one, _) = at_base, at_base.names
    fleet.operator.promote(one, "try it")
    asyncio.run(fleet.at_second(lambda engine: engine.unload_adapter(one)))
    assert {fleet.ask(user=f"user-{number}", max_tokens=2).model for number in range(8)} == {one}
    held = lambda: one in asyncio.run(fleet.at_second(lambda engine: engine.models()))  # noqa: E731
    wait_until(held, 20, "it was not loaded again")
    fleet.proved(one)


def test_mixed_up_adapters_get_no_traffic_and_are_served_under_a_name_without_a_past(at_base):
    fleet, (one, two) = at_base, at_base.names
    fleet.operator.promote(one, "try it")
    with fleet.sessions() as session:
        wrong = registry.verified_path(session, fleet.settings, two)

    async def mix_up(engine):
        await engine.unload_adapter(one)
        await engine.load_adapter(one, wrong)

    asyncio.run(fleet.at_second(mix_up))
    wait_until(lambda: fleet.second not in fleet.routes(one) or again(fleet, one), 30, "it was not noticed")
    wait_until(lambda: again(fleet, one), 30, "it was not mended")
    served_as = fleet.routes(one)[fleet.second]
    probes = []
    for url, name in ((fleet.first, one), (fleet.second, served_as)):

        async def logprobs(url=url, name=name):
            async with EngineClient(url) as engine:
                return await engine.prompt_logprobs(name, "The river runs to the sea.")

        probes.append(asyncio.run(logprobs()))
    assert probes[0] == pytest.approx(probes[1], abs=0.3)
    assert {fleet.ask(user=f"user-{number}", max_tokens=2).model for number in range(8)} == {one}


def again(fleet, name):
    return fleet.routes(name).get(fleet.second, name).startswith(f"{name}~")


def test_one_that_lies_about_a_load_is_not_believed_and_the_champion_stays(at_base, impatient):
    fleet, two = at_base, at_base.new_release(3)
    fleet.tamper.mode = "lies"
    error = refused(lambda: fleet.operator.promote(two, "try it"))
    assert error.code == "release_not_ready" and fleet.second in error.message and "ignored" in error.message
    assert fleet.champion() == "base" and fleet.second not in fleet.routes(two)
    assert fleet.ask().model == "base"
    fleet.tamper.mode = "honest"
    fleet.proved(two)
    assert fleet.operator.promote(two, "now")[1] == two


def test_one_that_hangs_in_a_load_keeps_no_other_waiting_and_the_champion_stays(at_base, impatient):
    fleet, one = at_base, at_base.new_release(4)
    fleet.tamper.mode = "hangs"
    with ThreadPoolExecutor(1) as pool:
        promotion = pool.submit(fleet.operator.promote, one, "try it")
        fleet.proved(one, fleet.first)
        assert not promotion.done(), "it waits for the one that hangs"
        assert refused(promotion.result).code == "release_not_ready"
    assert fleet.champion() == "base" and fleet.ask().model == "base"


def test_one_that_dies_in_the_swap_leaves_the_old_champion_and_after_its_restart_it_proves_again(at_base):
    fleet, one = at_base, at_base.new_release(5)
    fleet.tamper.mode = "dies"
    error = refused(lambda: fleet.operator.promote(one, "try it"))
    assert error.code == "release_not_ready" and fleet.champion() == "base"
    models = lambda: {fleet.ask(user=f"user-{number}", max_tokens=2).model for number in range(8)}  # noqa: E731
    assert models() == {"base"}, "nobody notices"
    wait_until(lambda: not up(fleet, fleet.second), 20, "it was not seen to be down")
    assert fleet.operator.promote(one, "without it")[1] == one
    assert models() == {one}
    fleet.tamper.mode = "honest"
    fleet.tamper.seen.clear()
    fleet.engines[1].start()
    fleet.engines[1].wait()
    assert not fleet.tamper.seen, "it got a request before it had proved anything"
    fleet.proved(one)
    assert set(fleet.tamper.seen) <= {one} and models() == {one}


@contextmanager
def answered(fleet, release):
    """Ask all the while: every answer must come, and from the release."""
    stop, answers = threading.Event(), []

    def ask(user):
        while not stop.is_set():
            try:
                answers.append(fleet.ask(user=user, max_tokens=4).model)
            except openai.APIError as error:
                answers.append(str(error))

    with ThreadPoolExecutor(3) as pool:
        for number in range(3):
            pool.submit(ask, f"user-{number}")
        try:
            yield
        finally:
            stop.set()
    assert set(answers) == {release}, answers


def test_a_file_that_changed_is_loaded_nowhere_and_answers_go_on(at_base):
    fleet, one = at_base, at_base.new_release(6)
    with fleet.sessions() as session:
        weights = registry.verified_path(session, fleet.settings, one) / "adapter_model.safetensors"
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)
    with answered(fleet, "base"):
        error = refused(lambda: fleet.operator.promote(one, "try it"), EverloopError)
        assert error.code == "adapter_changed" and "Register" in error.message
    for url in (fleet.first, fleet.second):
        assert one not in asyncio.run(models_of(url))
    assert fleet.champion() == "base" and not fleet.routes(one)


async def models_of(url):
    async with EngineClient(url) as engine:
        return await engine.models()


def test_what_is_quarantined_while_it_serves_is_left_at_once_and_cannot_come_back(at_base):
    fleet, one = at_base, at_base.new_release(7)
    fleet.operator.promote(one, "try it")
    assert fleet.ask().model == one
    with fleet.sessions.begin() as session:
        assert erasure.mark(session, ["run_7"], "quarantine")["champion"] == "base"
    wait_until(lambda: fleet.ask().model == "base", 10, "it serves on")
    with answered(fleet, "base"):
        error = refused(lambda: fleet.operator.promote(one, "again"), EverloopError)
        assert error.code == "adapter_quarantined"
        wait_until(lambda: not fleet.routes(one), 20, "it is still proved somewhere")
    with pytest.raises(openai.NotFoundError):
        fleet.ask(model=one)


@pytest.mark.slow
def test_what_is_wanted_no_more_is_unloaded_while_answers_go_on(at_base, monkeypatch):
    fleet, one, two, three = at_base, *(at_base.new_release(seed) for seed in (8, 9, 10))
    for name in (one, two, three):
        fleet.operator.promote(name, "on and on")
    with answered(fleet, three):
        assert {one, two, three} <= set(asyncio.run(models_of(fleet.first))), "an answer may still be on its way"
        with fleet.sessions.begin() as session:
            session.execute(sa.delete(WantedRelease))
        monkeypatch.setattr("deploy.replica.KEEP_S", 1.0)
        for url in (fleet.first, fleet.second):
            wait_until(lambda url=url: one not in asyncio.run(models_of(url)), 20, f"{url} still holds it")
            assert {two, three} <= set(asyncio.run(models_of(url))), "to go back to"
    assert not fleet.routes(one)
    assert fleet.operator.promote(one, "loaded anew")[1] == one and fleet.ask().model == one


@pytest.mark.slow
def test_one_that_takes_questions_and_answers_none_is_left_alone(at_base):
    fleet = at_base
    fleet.tamper.seen.clear()
    fleet.tamper.mode = "mute"

    def ask(number):
        return {chunk.model for chunk in fleet.ask(user=f"user-{number}", max_tokens=2, stream=True)}.pop()

    with ThreadPoolExecutor(12) as pool:
        assert set(pool.map(ask, range(12))) == {"base"}
    stuck = len(fleet.tamper.seen)
    assert stuck >= 3, "enough failed to open the breaker"
    began_s = time.monotonic()
    assert {ask(number) for number in range(12)} == {"base"}
    assert len(fleet.tamper.seen) - stuck <= 2 and time.monotonic() - began_s < 40, "they waited for it again"


def test_an_answer_ends_on_the_release_that_it_began_with(at_base):
    fleet, one = at_base, at_base.names[0]
    stream = fleet.ask(stream=True, max_tokens=120, user="slow")
    first = next(iter(stream))
    fleet.operator.promote(one, "in the middle")
    assert fleet.ask(user="slow").model == one
    rest = list(stream)
    assert {first.model, *(chunk.model for chunk in rest)} == {"base"} and rest[-1].choices[0].finish_reason
    with fleet.sessions() as session:
        assert session.get_one(Episode, first.id).release == "base"


def test_of_two_promotions_at_once_one_wins_and_the_other_is_told(at_base):
    fleet = at_base
    with ThreadPoolExecutor(2) as pool:
        moves = [pool.submit(fleet.operator.promote, name, "me first") for name in fleet.names]
        outcomes = [move.exception() for move in moves]
    lost = [error for error in outcomes if error is not None]
    assert len(lost) == 1 and isinstance(lost[0], ConflictError) and lost[0].code == "head_moved"
    winner = fleet.names[outcomes.index(None)]
    assert fleet.champion() == winner
    with fleet.sessions() as session:
        moved = sa.select(sa.func.count()).where(
            AuditEntry.action == "promoted_by_hand", AuditEntry.reason == "me first"
        )
        assert session.scalar(moved) == 1
        audit.verify(session)


def test_what_breaks_off_after_its_beginning_is_told_and_not_said_twice(at_base):
    fleet = at_base
    fleet.tamper.mode = "breaks"
    fleet.tamper.seen.clear()
    failed = 0
    for number in range(12):
        try:
            for _ in fleet.ask(user=f"user-{number}", stream=True, max_tokens=24):
                pass
        except openai.APIError as error:
            assert error.code == "engine_failed"
            failed += 1
    assert failed == len(fleet.tamper.seen) > 0


def test_with_every_replica_down_there_is_a_clear_503(at_base):
    """The last of this file: nothing is started again."""
    fleet = at_base
    fleet.engines[1].kill()
    fleet.engines[0].kill()
    with pytest.raises(openai.InternalServerError) as error:
        fleet.ask()
    assert error.value.status_code == 503 and error.value.code == "engine_unavailable"
    assert int(error.value.response.headers["retry-after"]) > 0
    assert refused(lambda: fleet.operator.promote(fleet.names[0], "try it")).code in (
        "engine_unavailable",
        "release_not_ready",
    )
