"""Where settings come from, and which place goes first."""

import pytest

from infra import settings
from infra.errors import SetupError

PASSWORD_URL = "postgresql+psycopg://everloop:s3cret@postgres/everloop"


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("EVERLOOP_HOME", str(tmp_path))
    for name in ("DATABASE_URL", "NIGHT_CRON", "TIME_ZONE", "SECRETS_DIR"):
        monkeypatch.delenv(f"EVERLOOP_{name}", raising=False)
    return tmp_path


def test_the_environment_goes_before_secrets_and_those_before_the_file(home, monkeypatch):
    (home / "everloop.toml").write_text(
        'night_cron = "1 1 * * *"\ntime_zone = "Asia/Tokyo"\ndatabase_url = "toml"\n'
    )
    secrets = home / "secrets"
    secrets.mkdir()
    (secrets / "everloop_database_url").write_text(PASSWORD_URL + "\n")
    (secrets / "everloop_night_cron").write_text("2 2 * * *")
    (secrets / "postgres_password").write_text("not a setting of ours")
    assert settings.load().database_url == "toml"
    monkeypatch.setenv("EVERLOOP_SECRETS_DIR", str(secrets))
    monkeypatch.setenv("EVERLOOP_NIGHT_CRON", "3 3 * * *")
    loaded = settings.load()
    assert loaded.database_url == PASSWORD_URL, "without the line's end"
    assert (loaded.night_cron, loaded.time_zone) == ("3 3 * * *", "Asia/Tokyo")


def test_a_slip_in_the_file_is_named(home):
    (home / "everloop.toml").write_text('night_corn = "1 1 * * *"\n')
    with pytest.raises(SetupError, match="night_corn: There is no such setting; did you mean night_cron"):
        settings.load()


@pytest.mark.parametrize(("name", "value", "told"), [
    ("api_port", "99999", "from 1 to 65535"), ("metrics_port", "0", "from 1 to 65535"),
    ("night_cron", "every day", "0 3 * * *"), ("attest_cron", "61 * * * *", "0 3 * * *"),
    ("erasure_cron", "0 3 * * * *", "0 3 * * *"), ("canary_steps", "[0.1", "JSON"),
])  # fmt: skip
def test_what_cannot_be_is_told_with_what_can(home, monkeypatch, name, value, told):
    monkeypatch.setenv(f"EVERLOOP_{name.upper()}", value)
    with pytest.raises(SetupError, match=name) as refused:
        settings.load()
    assert told in refused.value.message and "docs/settings.md" in refused.value.message


@pytest.mark.parametrize("schedule", ["*/90 0-23/2 1,15 jan-dec mon", "0 3 * * 7", "5 */6 * * *"])
def test_schedules_may_be_written_in_every_usual_way(home, monkeypatch, schedule):
    monkeypatch.setenv("EVERLOOP_NIGHT_CRON", schedule)
    assert settings.load().night_cron == schedule
