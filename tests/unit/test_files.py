"""Files that are there whole or not at all."""

import os

import pytest

from infra.files import write_whole


def test_a_write_that_breaks_off_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "seal.json"
    write_whole(path, "old")

    def no_disk(_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", no_disk)
        with pytest.raises(OSError):
            write_whole(path, "new, and longer")
    assert path.read_text() == "old"
    write_whole(path, "newer")
    assert path.read_text() == "newer" and [one.name for one in tmp_path.iterdir()] == ["seal.json"]
