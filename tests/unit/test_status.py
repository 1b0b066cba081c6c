"""What `everloop status` shows fits a small terminal, whatever there is to show."""

import pytest
from rich.console import Console

from infra.stack import status

PARTS = ("postgres", "broker", "engine", "prefect", "api", "relay", "ledger", "reconciler", "reward", "flows")
LONG = "r12-0123456789ab-which-somebody-named-at-length-indeed"


def found(num_decisions=0, **more):
    part = {"state": "running", "pid": 1, "uptime_s": 90_000, "restarts": 0}
    hop = {"health": "good", "figure": "12 events to send", "detail": f"oldest waits 0.1 s for {LONG} and more"}
    decision = {"title": f"Promote {LONG}?", "detail": "[bold] it is better, by far, " * 5}
    names = ("People", "Log", "Reward", "Training", "Gate", "Canary", "Champion")
    return {
        "running": True,
        "url": "http://127.0.0.1:23456",
        "parts": [{"name": name, **part} for name in PARTS],
        "deployment": {"champion": LONG, "challenger": LONG, "share": 0.05},
        "loop": {
            "parts": [{"name": name, **hop} for name in names],
            "decisions": [decision] * num_decisions,
        },
        **more,
    }


def shown(state):
    console = Console(width=80, height=24, record=True, color_system=None, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
    console.print(status.view(state))
    return console.export_text()


@pytest.mark.parametrize("num_decisions", [0, 1, 4, 30])
def test_it_fits_80_columns_and_24_lines(num_decisions):
    lines = shown(found(num_decisions)).splitlines()
    assert len(lines) <= 24 and max(map(len, lines)) <= 80
    assert sum("Promote" in line for line in lines) == min(num_decisions, 4)


def test_every_part_and_every_hop_is_there():
    text = shown(found(5))
    assert all(name in text for name in (*PARTS, "People", "Champion")) and "and 1 more" in text
    assert text.count("running") == len(PARTS) and "1 d" in text


def test_what_others_wrote_is_shown_as_it_is():
    assert "[bold]" in shown(found(1))


def test_a_part_that_is_down_and_restarts_are_told():
    state = found()
    state["parts"][3] |= {"state": "backoff", "restarts": 3, "uptime_s": 0}
    text = shown(state)
    assert "backoff" in text and "3 restarts" in text and not status.is_well(state)


def test_without_its_api_the_parts_are_shown_all_the_same():
    state = found(deployment=None, loop=None)
    assert "the API does not answer" in shown(state) and "postgres" in shown(state) and not status.is_well(state)


def test_without_a_stack_it_says_how_to_start_one():
    assert "everloop up" in shown({"running": False, "parts": []})
