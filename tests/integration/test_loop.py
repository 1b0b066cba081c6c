"""The loop on real parts: votes, a small night through Prefect, a canary, promotion, rollback."""

import asyncio
import json
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import openai
import pytest
import sqlalchemy as sa
from peft import PeftModel
from safetensors.numpy import load_file, save_file
from sqlalchemy.exc import DatabaseError
from transformers import AutoModelForCausalLM

from deploy import erasure, explanation, head, promotion, registry, serving
from deploy.canary import Watch
from deploy.replica import ReplicaKeeper
from deploy.runs import TrainingRun
from deploy.store import CARD, open_store
from deploy.tables import Adapter, AuditEntry, Canary, Release, WantedRelease
from feedback.tables import Episode
from flows.accounting import backlog
from flows.preferences import shortened
from infra.engine import EngineClient
from infra.errors import ConflictError, EverloopError, IntegrityError
from tests.adapters import CANARY
from tests.conftest import EVERLOOP, in_prefect, wait_until
from trainer import collect
from trainer.candidate import Candidate
from trainer.config import RunConfig
from trainer.night import Night
from trainer.prepared import Prepared
from trainer.recipe import resolve
from trainer.redactor import Redactor
from trainer.snapshot import DATASET_FILE, Snapshot
from trainer.verifiers.instructions import INSTRUCTIONS
from trainer.verifiers.reasoning import LEVELS

SMALL = {
    "max_rows": 40,
    "num_prompts": 4,
    "samples_per_prompt": 2,
    "max_answer_tokens": 32,
    "num_gate_prompts": 8,
    "min_margin": 0.0,
    "epochs": 1.0,
    "gate_tasks_per_skill": 1,
    "gate_behaviour_questions": 2,
    "gate_timed_answers": 2,
    "checkpoints_judged": 2,
    "judge_prompts": 4,
}
TOPICS = [
    *("rain", "bread", "chess", "tides", "bees", "glass", "maps", "salt", "kites", "moss", "ink", "owls"),
    *("rope", "soap", "yeast", "wool", "zinc", "figs", "jazz", "lava", "mint", "oaks", "peat", "rye"),
]


def train(stack):
    """Run `everloop train` with the small configuration, as an operator would."""
    file = stack.settings.home / "small.toml"
    file.write_text(resolve(SMALL)[1].to_toml())
    command = [*EVERLOOP, "train", "--config", str(file), "--canary-share", "0.5", "--json", "-"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    with stack.sessions() as session:
        return session.get_one(TrainingRun, json.loads(done.stdout)["run"])


@pytest.fixture(scope="module")
def night(stack):
    """A night after some rated and corrected answers; its run."""

    def teach(number):
        user = f"teacher-{number % 5}"
        completion = stack.ask(f"Tell me something about {TOPICS[number]}.", max_tokens=48, user=user)
        stack.feedback(completion.id, kind="thumb", value=1 if number % 4 == 0 else -1, user=user)
        if number % 4:
            text = shortened(completion.choices[0].message.content)
            stack.feedback(completion.id, kind="correction", text=text, user=user)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(teach, range(len(TOPICS))))
    wait_until(lambda: drained(stack), timeout_s=60)
    return train(stack)


def drained(stack):
    with stack.sessions() as session:
        return backlog(session) == 0


@pytest.fixture(scope="module")
def release(stack, night):
    """The night's release, as a challenger that half of the users meet."""
    with stack.sessions.begin() as session:
        if head.read(session).canary_id is None:
            promotion.try_out(session, stack.settings, night.release, share=0.5, actor="test", reason="by hand")
    return night.release


def dataset_of(stack, night):
    return stack.settings.datasets_dir / night.dataset_digest / DATASET_FILE


def test_operators_see_the_night_and_find_it_in_prefect(stack, night):
    found = in_prefect(stack.settings).get(f"/flow_runs/{night.flow_run_id}")
    assert found.status_code == 200 and found.json()["state_type"] == "COMPLETED"
    page = stack.http.get(f"/operate/runs/{night.id}").text
    assert f"/runs/flow-run/{night.flow_run_id}" in page
    assert 'id="chart-loss"' in page and 'id="chart-overoptimisation"' in page
    assert stack.http.get(f"/operate/runs/{night.id}?csv=overoptimisation").text.startswith('"sqrt(KL), nats"')


def test_the_night_trains_and_judges_by_what_is_really_served(stack, night):
    assert night.status in ("canary", "held"), night.result
    gates = {gate["gate"]: gate for gate in night.result["gates"]}
    assert gates["differs_from_base"]["verdict"] == gates["differs_from_champion"]["verdict"] == "pass"
    assert gates["win_rate"]["n"] > 0
    skills = [name for name in gates if name.startswith("skill ")]
    assert len(skills) == len(INSTRUCTIONS) + len(LEVELS) and gates["skills"]["n"] >= len(skills) - 1
    run_dir = stack.settings.runs_dir / night.id
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert {"sample", "score", "train", "peak", "gates"} <= {line["phase"] for line in lines}
    points = [line for line in lines if line["phase"] == "peak" and "kl" in line]
    assert [point["kl"] for point in points if point["step"] == 0] == [0.0]  # the champion is the base model
    assert len(points) == 3 and sum(point["taken"] for point in points) == 1 and points[-1]["kl"] > 0.0
    assert gates["kl_to_base"]["value"] == next(point["kl"] for point in points if point["taken"])
    assert "sqrt(KL" in (run_dir / "overoptimisation.svg").read_text()
    assert not (run_dir / "kept").exists() and not (run_dir / "policy").exists()


def test_the_snapshot_holds_no_gate_prompt_and_only_what_may_be_learned(stack, night):
    lines = dataset_of(stack, night).read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert {row["split"] for row in rows} == {"train", "gate"}
    trained, judging = ({r["conversation"] for r in rows if r["split"] == split} for split in ("train", "gate"))
    assert not trained & judging and not any(map(collect.is_held_out, trained))
    with stack.sessions() as session:
        silent = set(session.scalars(sa.select(Episode.id).where(~Episode.learn)))
    assert not silent & {row["episode_id"] for row in rows}


def test_the_adapter_is_registered_whole_and_loads_in_plain_peft(stack, night):
    with stack.sessions() as session:
        adapter = session.scalars(sa.select(Adapter).where(Adapter.run_id == night.id)).one()
        path = registry.verified_path(session, stack.settings, night.release)
    assert {"dataset_digest", "reward_snapshot_id", "base_digest", "config", "files"} <= set(adapter.manifest)
    assert sorted(p.suffix for p in path.iterdir()) == [".json", ".json", ".md", ".safetensors"]
    card = (path / CARD).read_text()
    assert f"# {night.release}" in card and "goes on from: base" in card and "| win_rate |" in card
    assert night.id in card and night.dataset_digest[:16] in card and "best-of-n" in card
    model = AutoModelForCausalLM.from_pretrained(stack.settings.base_model_dir)
    loaded = PeftModel.from_pretrained(model, str(path))
    assert any("lora_B" in n and p.abs().sum() > 0 for n, p in loaded.named_parameters())


def test_a_changed_adapter_is_not_loaded(stack, night):
    with stack.sessions() as session:
        adapter = session.scalars(sa.select(Adapter).where(Adapter.run_id == night.id)).one()
        weights = open_store(stack.settings).place(adapter.digest) / "adapter_model.safetensors"
        whole = weights.read_bytes()
        weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        try:
            with pytest.raises(IntegrityError) as refused:
                registry.verified_path(session, stack.settings, night.release)
        finally:
            weights.write_bytes(whole)
    assert refused.value.code == "adapter_changed"


def test_the_canary_is_sticky_logs_its_propensity_and_is_promoted_on_votes(stack, release):
    wait_until(lambda: release in served(stack), timeout_s=30, what="the reconciler did not load the challenger")
    arms, answers = {}, {}

    def visit(number):
        user = f"visitor-{number}"
        completion = stack.ask("Say hello.", user=user)
        with stack.sessions() as session:
            episode = session.get_one(Episode, completion.id)
        assert episode.propensity == 0.5 and episode.arm in ("champion", "challenger")
        assert (completion.model == release) == (episode.arm == "challenger")
        assert episode.arm == arms.setdefault(user, episode.arm)
        assert stack.ask("Say hello.", user=user).model == completion.model
        answers[user] = completion.id

    def vote(user):
        for value in (1 if arms[user] == "challenger" else -1, 1):  # only the user's first thumb counts
            assert stack.feedback(answers[user], kind="thumb", value=value, user=user).status_code == 202

    # A night that passed has the canary watched: nobody votes before all have asked, or it is decided meanwhile.
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(visit, range(40)))
        list(pool.map(vote, arms))
    assert set(arms.values()) == {"champion", "challenger"}
    decide(stack)
    with stack.sessions() as session:
        canary = session.scalars(sa.select(Canary).order_by(Canary.id.desc()).limit(1)).one()
        test = canary.evidence["tests"]["better"]
        assert canary.decision == "promote" and test["highest"] >= test["limit"] >= 20
        assert sum(arm["votes"] for arm in canary.evidence["arms"].values()) <= 40
        assert explanation.explain(session, canary)["agrees"]
        assert head.read(session).champion == release
    assert stack.ask().model == release


def decide(stack):
    """The watcher may be at it already (a night that passed starts it); look until the canary is closed."""
    watch = Watch(stack.sessions, stack.settings)
    wait_until(watch.look, timeout_s=30, what="the canary was not decided")


def served(stack):
    return {model.id for model in stack.openai.models.list()}


def test_the_champion_is_loaded_again_after_the_engine_restarts(stack, release):
    stack.supervisor.stop("engine")
    stack.supervisor.start("engine")

    def answered():
        try:
            return stack.ask().model == release
        except Exception:
            return False

    wait_until(answered, timeout_s=180, what="the champion did not come back after the engine's restart")


def altered(source, target, *, columns=None, **config):
    """Copy an adapter with another configuration, or with `columns` of each lora_A and none of what it learned."""
    shutil.copytree(source, target)
    told = json.loads((source / "adapter_config.json").read_text()) | config
    (target / "adapter_config.json").write_text(json.dumps(told))
    weights = load_file(source / "adapter_model.safetensors")
    rank = told["r"]
    for name, tensor in weights.items():
        num_in, num_out = columns or tensor.shape[1], tensor.shape[0]
        weights[name] = np.zeros((rank, num_in) if "lora_A" in name else (num_out, rank), np.float32)
    save_file(weights, target / "adapter_model.safetensors")
    return target


def test_an_adapter_of_another_rank_or_base_is_refused_and_the_champion_goes_on_serving(stack, release, tmp_path):
    with stack.sessions() as session:
        assert head.read(session).champion == release
        source = registry.verified_path(session, stack.settings, release)
    large = altered(source, tmp_path / "large", r=2 * stack.settings.max_lora_rank)
    wide = altered(source, tmp_path / "wide", columns=2048)
    for directory, code in ((large, "adapter_rank_too_large"), (wide, "adapter_of_another_base")):
        command = [*EVERLOOP, "releases", "import", str(directory), "--reason", "a test"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 1 and f"[{code}]" in done.stderr
    # The engine itself refuses such a rank too; the champion is not disturbed by it.

    async def load():
        async with EngineClient(stack.settings.need("engine_url"), stack.settings.engine_key) as engine:
            await engine.load_adapter("too-large", large)

    with pytest.raises(EverloopError):
        asyncio.run(load())
    assert stack.ask().model == release and "too-large" not in served(stack)


def test_a_challenger_of_another_base_is_not_loaded_and_the_champion_goes_on_serving(stack, release):
    """As it is when base_model was changed behind a candidate: whoever watches canaries ends it within a second."""
    name = "of-another-base"
    with stack.sessions.begin() as session:
        session.add(Adapter(digest="0" * 64, base_digest="0" * 64, manifest={}))
        session.flush()
        session.add(Release(name=name, adapter_digest="0" * 64))
        session.flush()
        serving.want(session, name)  # the canary may end before a replica is looked at
        canary_id = head.open_canary(session, challenger=name, **CANARY).id
    try:
        log = stack.settings.log_dir / "reconciler.log"
        wait_until(lambda: f"{name} is not served" in log.read_text(), timeout_s=30)
        assert "[adapter_of_another_base]" in log.read_text() and name not in served(stack)
        user = next(u for u in map(str, range(100)) if head.unit_interval(canary_id, u) >= 0.5)
        assert stack.ask(user=user).model == release
        wait_until(lambda: decision_of(stack, canary_id), timeout_s=30, what="its canary went on")
        assert decision_of(stack, canary_id) == "unservable"
        done = subprocess.run([*EVERLOOP, "promote", name, "--reason", "x"], capture_output=True, text=True)
        assert done.returncode == 1 and "[adapter_of_another_base]" in done.stderr
    finally:
        with stack.sessions.begin() as session:
            session.execute(sa.delete(WantedRelease).where(WantedRelease.release == name))
            if head.read(session).canary_id == canary_id:
                head.close_canary(session, canary_id, decision="rollback", evidence={}, actor="test", reason="")
    assert stack.ask().model == release
    assert stack.ask(model="champion").model == release


def decision_of(stack, canary_id):
    with stack.sessions() as session:
        return session.get_one(Canary, canary_id).decision


def test_of_two_moves_at_once_one_wins_and_the_other_is_told(stack, release):
    with stack.sessions() as one, stack.sessions() as two:
        stale = head.read(two)
        assert stale.champion == release
        head.move_champion(one, "base", action="promoted_by_hand", actor="one", reason="first")
        one.commit()
        two.expunge_all()
        with pytest.raises(ConflictError) as lost:
            head._swap(two, stale, "promoted_by_hand", "two", "second", release="base", champion="base")
        two.rollback()
    assert lost.value.code == "head_moved"


def test_rollback_by_command_takes_a_reason_and_is_followed_at_once(stack, release):
    refused = subprocess.run([*EVERLOOP, "rollback"], capture_output=True, text=True)
    assert refused.returncode == 2 and "--reason" in refused.stderr
    done = subprocess.run(
        [*EVERLOOP, "rollback", "--reason", "it was too terse", "--json", "-"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["champion"] == release
    assert stack.ask().model == release
    done = subprocess.run([*EVERLOOP, "promote", "base", "--reason", "start over"], capture_output=True, text=True)
    assert done.returncode == 0 and stack.ask().model == "base"
    unknown = subprocess.run([*EVERLOOP, "promote", "r9-nope", "--reason", "x"], capture_output=True, text=True)
    assert unknown.returncode == 1 and "[release_not_found]" in unknown.stderr


def test_every_act_is_in_the_audit_log_which_the_database_keeps(stack, release):
    with stack.sessions() as session:
        actions = set(session.scalars(sa.select(AuditEntry.action)))
        assert {"registered", "canary_opened", "promoted", "rolled_back_by_hand"} <= actions
        for statement in ("UPDATE audit_log SET reason = ''", "DELETE FROM audit_log", "TRUNCATE audit_log"):
            with pytest.raises(DatabaseError, match="append-only"):
                session.execute(sa.text(statement))
            session.rollback()


def test_an_adapter_of_another_base_model_is_not_gone_on_from(stack, night, monkeypatch):
    with stack.sessions() as session:
        registry.verified_path(session, stack.settings, night.release)
        monkeypatch.setattr("deploy.registry.base_model_digest", lambda _: "0" * 64)
        with pytest.raises(IntegrityError) as refused:
            registry.verified_path(session, stack.settings, night.release)
    assert refused.value.code == "adapter_of_another_base"
    with stack.sessions.begin() as session:
        head.move_champion(session, night.release, action="promoted_by_hand", actor="test", reason="to go on from")
    refused = Night(stack.sessions, stack.settings, {}, 0.5, min_new_signals=0)
    try:
        with pytest.raises(IntegrityError, match="another base model"):
            refused.run()
    finally:
        with stack.sessions.begin() as session:
            head.move_champion(session, "base", action="promoted_by_hand", actor="test", reason="begin anew")
    with stack.sessions() as session:
        run = session.get_one(TrainingRun, refused.record.run_id)
    # Before anything was sampled from it.
    assert (run.status, run.phase, run.result["code"]) == ("failed", "snapshot", "adapter_of_another_base")


def test_a_release_that_is_judged_stays_in_the_engine_however_long_that_takes(stack, night, monkeypatch):
    monkeypatch.setattr("deploy.replica.KEEP_S", -1.0)
    keeper = ReplicaKeeper(stack.sessions, stack.settings, stack.settings.need("engine_url"))

    def set_status(status):
        with stack.sessions.begin() as session:
            session.execute(sa.update(TrainingRun).where(TrainingRun.id == night.id).values(status=status))
        with stack.sessions() as session:
            return serving.wanted(session)

    held = [night.release, f"{night.release}~2", "base", "run/x@1", "somebody-elses"]
    assert night.release in set_status("running")
    try:
        assert keeper._expired(held, ["base"]) == []
    finally:
        set_status(night.status)
    assert keeper._expired(held, ["base"]) == held[:2]
    assert keeper._expired(held, ["base", night.release]) == []


def test_a_candidate_is_given_again_to_an_engine_that_lost_it(stack, night):
    told = SimpleNamespace(progress=lambda done: None)
    candidate = Candidate(stack.sessions, stack.settings, RunConfig(max_answer_tokens=8), told, None)
    sample = candidate._sampler()

    async def forget():
        async with EngineClient(stack.settings.need("engine_url"), stack.settings.engine_key) as engine:
            if night.release in await engine.models():
                await engine.unload_adapter(night.release)

    asyncio.run(forget())
    ((found,),) = sample(night.release, [[{"role": "user", "content": "Why?"}]], 1, 0)
    assert found.model == night.release and found.token_ids


def test_a_release_that_somebody_has_met_or_another_run_made_is_not_taken_back(stack, night):
    with stack.sessions() as session:
        assert registry.take_back(session, night.release, "run_other") is None
        head.move_champion(session, night.release, action="promoted_by_hand", actor="test", reason="to be met")
        assert registry.take_back(session, night.release, night.id) is None
        session.rollback()


def test_releases_are_never_renamed_or_reused(stack, night):
    with stack.sessions.begin() as session:
        adapter = session.scalars(sa.select(Adapter).where(Adapter.run_id == night.id)).one()
        source = open_store(stack.settings).place(adapter.digest)
        again = registry.register(session, stack.settings, source, run_id=None, manifest=adapter.manifest)
        assert again.name == night.release
        assert session.query(Release).filter_by(adapter_digest=adapter.digest).count() == 1


def test_forgetting_a_teacher_scrubs_datasets_marks_what_learned_and_the_next_night_starts_clean(stack, night):
    dataset = dataset_of(stack, night)
    teacher = "teacher-1"
    with stack.sessions() as session:
        theirs = set(session.scalars(sa.select(Episode.id).where(Episode.user_id == teacher)))
    held = [json.loads(line)["episode_id"] for line in dataset.read_text().splitlines()]
    assert theirs & set(held), "the run learned from this teacher"
    subprocess.run([*EVERLOOP, "promote", night.release, "--reason", "to see it marked"], check=True)
    done = subprocess.run([*EVERLOOP, "users", "forget", teacher, "--json", "-"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["found"]
    assert night.id in found["trainer"]["runs_marked"] and night.dataset_digest in found["trainer"]["datasets"]
    assert found["trainer"]["dataset_lines_removed"] == len(theirs & set(held))
    assert found["deploy"] == {
        "releases_marked": [night.release],
        "mark": "retrain-required",
        "champion": night.release,
    }
    left = {json.loads(line)["episode_id"] for line in dataset.read_text().splitlines()}
    assert left == set(held) - theirs
    with stack.sessions() as session:
        assert session.get_one(TrainingRun, night.id).retrain_required
        assert registry.clean_ancestor(session, night.release) == "base"
        data = collect.take(session, Redactor())
    assert not theirs & {example.episode_id for example in [*data.train, *data.gate]}


def test_under_quarantine_what_learned_from_a_forgotten_teacher_is_served_no_more(stack, night):
    with stack.sessions.begin() as session:
        assert head.read(session).champion == night.release
        result = erasure.mark(session, [night.id], "quarantine")
        assert result["champion"] == "base"
    assert stack.ask().model == "base"
    with pytest.raises(openai.NotFoundError):
        stack.ask(model=night.release)
    wait_until(lambda: night.release not in served(stack), timeout_s=15, what="the engine keeps it")
    with stack.sessions() as session, pytest.raises(IntegrityError) as refused:
        registry.verified_path(session, stack.settings, night.release)
    assert refused.value.code == "adapter_quarantined"


def test_a_candidate_that_was_marked_while_it_was_judged_meets_nobody(stack, night):
    judged = Night(stack.sessions, stack.settings, {}, 0.5)
    judged.record.create(judged.config)
    with stack.sessions() as session:
        release = registry.get_release(session, night.release)
    ready = Prepared(Snapshot(), None, "base", "base", 1)
    candidate = Candidate(stack.sessions, stack.settings, judged.config, judged.record, ready)
    result = candidate._end(release, 0.5, [])
    assert result["status"] == "held" and "forgotten" in result["reason"]
    with stack.sessions() as session:
        assert head.read(session).canary_id is None
        assert session.get_one(TrainingRun, judged.record.run_id).last_signal_seq is None


def test_a_receipt_leads_from_a_signal_to_its_run_and_the_release(stack, night):
    lines = dataset_of(stack, night).read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    row = next(row for row in rows if row["split"] == "train")
    with stack.sessions() as session:
        user = session.get_one(Episode, row["episode_id"]).user_id

    def told():
        path = f"/v1/feedback/{row['feedback_ids'][0]}/receipt"
        found = stack.http.get(path, headers={"X-Everloop-User": user}).json()
        return next((part for part in found["training"] if part["fate"] == "quarantined"), None)

    part = wait_until(told, what="the receipt did not tell")
    assert part["run_id"] == night.id and part["release"] == night.release and part["role"] == "train"
    assert part["dataset_digest"] == night.dataset_digest and part["adapter_digest"]
