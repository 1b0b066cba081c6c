"""What commands print."""

import json

from infra import report

FOUND = {
    "accuracy": 0.123456,
    "kinds": {"judge": {"weight": 0.5}},
    "table": [{"from": 0.0, "count": 3}, {"from": 0.1, "count": 4}],
    "pools": [0.8, 0.75],
    "empty": [],
}


def test_every_field_has_a_line_and_so_has_every_row_of_a_list(capsys):
    report.print_fields(None, FOUND)
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    assert [[word.strip() for word in line] for line in lines] == [
        ["accuracy", "0.1235"],
        ["kinds.judge.weight", "0.5"],
        ["table", "from 0, count 3"],
        ["table", "from 0.1, count 4"],
        ["pools", "0.8, 0.75"],
        ["empty"],
    ]


def test_json_on_standard_output_is_alone_there(capsys):
    report.print_fields("-", FOUND)
    assert json.loads(capsys.readouterr().out) == FOUND


def test_what_is_left_of_work_that_goes_on_is_told_by_the_pace_since(monkeypatch):
    said, now = [], [0.0]
    monkeypatch.setattr(report, "say", said.append)
    monkeypatch.setattr(report.time, "monotonic", lambda: now[0])
    phase = report.Phase("training", 40)
    for done, at_s in ((30, 1.0), (31, 11.5), (32, 22.0)):
        now[0] = at_s
        phase.update(done)
    # The first of these steps was the 31st: 30 were done before.
    assert said == ["training: 31/40", "training: 32/40, about 84 s left"]
