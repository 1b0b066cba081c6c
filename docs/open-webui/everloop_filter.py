"""
title: Everloop: which answer is which episode
description: Tells Everloop who asks, and keeps the episode of each answer, so that a rating can name it.
version: 1.0.0
"""

import os
import sqlite3
from contextlib import closing
from pathlib import Path

DATABASE = Path(os.environ.get("DATA_DIR", ".")) / "everloop-episodes.sqlite"


class Filter:
    """A filter of Open WebUI, for the models that Everloop serves."""

    def inlet(self, body, __user__=None):
        """Name the user, whom the key may act for."""
        if __user__:
            body["user"] = f"open-webui {__user__['id']}"
        return body

    def stream(self, event, __metadata__=None):
        """Keep the id of the first piece of an answer: it is the episode's."""
        message_id = (__metadata__ or {}).get("message_id")
        episode_id = str(event.get("id", ""))
        delta = (event.get("choices") or [{}])[0].get("delta") or {}
        if message_id and episode_id.startswith("ep_") and "role" in delta:
            self._keep(message_id, episode_id)
        return event

    @staticmethod
    def _keep(message_id, episode_id):
        with closing(sqlite3.connect(DATABASE, timeout=5)) as database, database:
            database.execute("CREATE TABLE IF NOT EXISTS episodes (message_id TEXT PRIMARY KEY, episode_id TEXT)")
            database.execute("INSERT OR REPLACE INTO episodes VALUES (?, ?)", (message_id, episode_id))
