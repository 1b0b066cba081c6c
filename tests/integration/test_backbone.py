"""The reward backbone with the real model: trained, judged, and active only if it wins."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session
from typer.testing import CliRunner

from feedback import episodes, erasure
from feedback.acceptance import accept
from feedback.episodes import Recording, new_episode_id
from feedback.signals import read_signal
from infra.cli import app
from infra.db import advisory_lock, connect
from infra.errors import ConflictError, IntegrityError
from infra.events import RebuildRequested
from infra.log import reading
from infra.log.consumer import Delivery
from infra.settings import Settings
from infra.stack.embedded import migrate
from infra.tables import OutboxRow
from reward import backbone, encoders, state
from reward.backbone_config import BackboneConfig
from reward.encoder import open_encoder
from reward.feature_cache import answers_concerned
from reward.style import STYLE_NAMES
from reward.tables import Features, RewardEncoder, RewardUpdate
from reward.worker import RewardWorker

pytestmark = pytest.mark.filterwarnings("error:Found missing adapter keys")

ROOT = Path(__file__).parents[2]
NUM_PROMPTS = 44
SAMPLE = [([{"role": "user", "content": "Name a colour."}], "Blue is a colour. I hope that this helps!")]


def config(seed):
    """Three steps, another adapter for each seed."""
    return BackboneConfig(seed=seed, epochs=1.5, max_pair_tokens=64)


@dataclasses.dataclass(frozen=True)
class Active:
    """The encoder whose scores count now; `adapter_dir` is None for the frozen one."""

    name: str
    adapter_dir: Path | None


@dataclasses.dataclass
class World:
    """A database of its own, with comparisons of warm answers and curt ones."""

    settings: Settings
    sessions: object

    def run(self, seed=0):
        return backbone.run(self.sessions, self.settings, config(seed))

    def rows(self):
        with self.sessions() as session:
            return {row.name: row for row in session.scalars(sa.select(RewardEncoder))}

    def active(self):
        with self.sessions() as session:
            encoder = encoders.open_active_encoder(session, self.settings)
            return Active(encoder.name, encoder.adapter_dir)

    def rebuilds(self):
        with self.sessions() as session:
            values = session.scalars(sa.select(OutboxRow.value).order_by(OutboxRow.seq)).all()
            found = [
                envelope for envelope in map(reading.parse, values) if envelope.event_class is RebuildRequested
            ]
            return [event.encoder for _, event in reading.open_all(session, found, [RebuildRequested])]


@pytest.fixture(scope="module")
def world(stack, empty_database, tmp_path_factory):
    settings = Settings(
        home=tmp_path_factory.mktemp("backbone"),
        database_url=empty_database,
        base_model=str(stack.settings.base_model_dir),
        min_backbone_pairs=40,
    )
    migrate(settings)
    sessions = connect(empty_database, pool_size=2)
    with sessions.begin() as session:
        for number in range(NUM_PROMPTS):
            user = "leaver" if number == 3 else f"teacher-{number % 5}"
            warm, curt = (record(session, user, number, text) for text in ("I hope this helps you!", "Whatever."))
            signal(session, user, warm, "preference", over=curt)
    yield World(settings, sessions)
    sessions.kw["bind"].dispose()


def record(session: Session, user: str, number: int, end: str) -> str:
    key, learn = episodes.begin(session, user, True)
    messages = [{"role": "user", "content": f"What is {number} plus {number}?"}]
    recording = Recording(
        new_episode_id(), user, "base", None, None, "champion", 1.0, messages, {}, learn, f"{2 * number}. {end}"
    )
    recording.status = "complete"
    assert episodes.record(session, recording, key)
    return recording.episode_id


def signal(session: Session, user: str, episode_id: str, kind: str, **said) -> None:
    body = {"episode_id": episode_id, "user": user, "kind": kind, "idempotency_key": f"{kind} {episode_id}", **said}
    accept(session, read_signal.validate_python(body))


@pytest.fixture
def verdict(monkeypatch):
    """Decide the contests, after they were really held."""
    held = backbone.compare

    def decide(verdict):
        def contest(*args):
            return dataclasses.replace(held(*args), verdict=verdict, reason=f"the test says {verdict}")

        monkeypatch.setattr(backbone, "compare", contest)

    return decide


def test_a_backbone_that_loses_changes_nothing(world, verdict):
    frozen = open_encoder(world.settings)
    verdict("lose")
    result = world.run(seed=0)
    assert result["status"] == "rejected" and result["num_pairs"] == NUM_PROMPTS
    assert result["training"]["num_trained"] == 14 and result["training"]["num_steps"] >= 2
    contest = result["contest"]
    assert (contest["num_learned"], contest["num_judged"]) == (14, 30)
    assert 0 < contest["active"]["log_loss"] < 1 and 0 <= contest["candidate"]["accuracy"] <= 1
    row = world.rows()[result["encoder"]]
    assert row.status == "rejected" and row.evaluation["contest"]["verdict"] == "lose"
    assert world.active() == Active(frozen.name, None) and not world.rebuilds()
    with world.sessions() as session:
        assert session.scalars(sa.select(Features.encoder).distinct()).all() == [frozen.name]

    candidate = encoders.open_backbone(world.settings, Path(row.adapter_path), row.adapter_digest)
    assert candidate.name == row.name != frozen.name and candidate.dim == frozen.dim
    apart = np.abs(candidate.encode(SAMPLE) - frozen.encode(SAMPLE))[0]
    style = slice(-1 - len(STYLE_NAMES), None)
    assert apart[style].max() == 0 and apart[: style.start].max() > 1e-3

    again = world.run(seed=0)
    assert again["status"] == "skipped" and "nothing new" in again["reason"]
    assert not list(world.settings.backbones_dir.iterdir()), "a rejected adapter is kept by nobody"


KILLED = """
import json, os, signal, sys
from infra.db import connect
from infra.settings import load
from reward import backbone
from reward.backbone_config import BackboneConfig
backbone._Run._judge = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
settings = load()
backbone.run(connect(settings.need("database_url")), settings, BackboneConfig(**json.loads(sys.argv[1])))
"""


def test_a_run_killed_after_the_training_is_finished_by_the_next(world, verdict, monkeypatch):
    names = ("home", "database_url", "base_model", "min_backbone_pairs")
    environment = {f"EVERLOOP_{name.upper()}": str(getattr(world.settings, name)) for name in names}
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, config(1).model_dump_json()],
        env={**os.environ, **environment, "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert killed.returncode == -9, killed.stderr[-2000:]
    left = [row for row in world.rows().values() if row.status == "candidate"]
    assert len(left) == 1 and world.active().adapter_dir is None and not world.rebuilds()
    (world.settings.backbones_dir / ".training-cut-off").mkdir()

    monkeypatch.setattr("reward.backbone_training.train", None)  # it must not train again
    verdict("win")
    result = world.run(seed=1)
    assert result["status"] == "activated" and result["encoder"] == left[0].name
    assert world.active() == Active(left[0].name, Path(left[0].adapter_path))
    assert world.rebuilds() == [left[0].name]
    assert [path.name for path in world.settings.backbones_dir.iterdir()] == [left[0].adapter_digest]
    with world.sessions() as session:
        wanted = {answer.digest for answer in answers_concerned(session)}
        query = sa.select(Features.answer_digest).where(Features.encoder == left[0].name)
        assert wanted == set(session.scalars(query)) and len(wanted) == 2 * NUM_PROMPTS

    assert world.run(seed=1)["status"] == "skipped"
    with world.sessions.begin() as session:
        assert encoders.activate(session, left[0].name, open_encoder(world.settings), {"reason": "again"})
    assert world.rebuilds() == [left[0].name], "one event, however often it is asked for"


def test_the_worker_learns_anew_under_the_backbone_that_won(world, monkeypatch):
    frozen, won = open_encoder(world.settings), world.active().name
    worker = RewardWorker(world.sessions, world.settings, frozen)
    asked = [Delivery(RebuildRequested(encoder=won, reason="a test"), "rb_1")]

    def learned(encoder):
        with world.sessions() as session:
            return session.query(RewardUpdate).filter_by(encoder=encoder, action="add").count()

    with monkeypatch.context() as before_it_won, world.sessions.begin() as session:
        before_it_won.setattr(encoders, "open_active_encoder", lambda *_: frozen)
        worker.on_rebuild(session, asked)
    assert (learned(frozen.name), learned(won)) == (NUM_PROMPTS, 0)
    with world.sessions.begin() as session:
        worker.on_rebuild(session, asked)
    assert worker.encoder.name == won
    assert (learned(frozen.name), learned(won)) == (NUM_PROMPTS, NUM_PROMPTS), "the other's history stays"
    with world.sessions() as session:
        assert state.load(session, won, worker.encoder.dim)[1].num_signals == NUM_PROMPTS


def test_the_active_backbones_files_are_checked(world):
    row = next(row for row in world.rows().values() if row.status == "active")
    weights = Path(row.adapter_path) / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    try:
        with pytest.raises(IntegrityError) as refused:
            world.active()
    finally:
        weights.write_bytes(whole)
    assert refused.value.code == "backbone_changed"
    assert world.active().name == row.name


def test_a_backbone_of_another_layer_is_passed_over(world):
    shallow = world.settings.model_copy(update={"encoder_layer": 15})
    with world.sessions() as session:
        assert encoders.open_active_encoder(session, shallow).name == open_encoder(shallow).name


def test_one_at_a_time(world):
    with advisory_lock(world.sessions, "reward-backbone"), pytest.raises(ConflictError) as refused:
        world.run()
    assert refused.value.code == "backbone_in_progress"


def test_what_learned_from_a_forgotten_user_is_neither_activated_nor_kept(world, verdict, monkeypatch):
    before = world.active()
    verdict("win")
    fill = backbone.feature_cache.fill

    def forget_meanwhile(sessions, encoder, answers):
        fill(sessions, encoder, answers)
        with sessions.begin() as session:
            if (
                session.scalar(sa.text("SELECT 1 FROM users WHERE user_id = 'leaver'"))
                and encoder.name != before.name
            ):
                erasure.forget(session, "leaver", "retrain-required")

    monkeypatch.setattr(backbone.feature_cache, "fill", forget_meanwhile)
    result = world.run(seed=2)
    assert result["status"] == "rejected" and "forgotten" in result["reason"]
    assert world.active() == before

    with world.sessions.begin() as session:
        tombstone = session.scalar(sa.text("SELECT tombstone FROM erasures"))
        _, signal_ids = erasure.concerned(session, tombstone)
        assert before.name in encoders.retire_taught_by(session, world.settings, signal_ids)
    frozen = open_encoder(world.settings).name
    assert world.active() == Active(frozen, None)
    assert world.rebuilds() == [before.name, frozen]
    assert world.rows()[before.name].status == "retired"
    skipped = backbone.run(
        world.sessions, world.settings.model_copy(update={"min_backbone_pairs": 1000}), config(3)
    )
    assert skipped["status"] == "skipped" and skipped["num_pairs"] == NUM_PROMPTS - 1
    assert not before.adapter_dir.exists()


def test_the_command_says_what_is_missing(stack, monkeypatch):
    monkeypatch.setenv("EVERLOOP_MIN_BACKBONE_PAIRS", "1000000")
    done = CliRunner().invoke(app, ["reward", "backbone", "--json", "-"])
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["status"] == "skipped" and "min_backbone_pairs is 1000000" in report["reason"]
