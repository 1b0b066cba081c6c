"""
title: Everloop: ratings
description: Sends what people say of an answer to Everloop, as a thumb and a comment about its episode.
version: 1.0.0
"""

import hashlib
import json
import os
import sqlite3
from contextlib import closing
from pathlib import Path

import httpx
from open_webui.models.feedbacks import Feedbacks
from pydantic import BaseModel, Field

DATABASE = Path(os.environ.get("DATA_DIR", ".")) / "everloop-episodes.sqlite"
THUMBS = {1: 1, -1: -1, "1": 1, "-1": -1}


class Event:
    """An event function of Open WebUI."""

    class Valves(BaseModel):
        """What an administrator sets."""

        url: str = Field("http://127.0.0.1:8080/v1", description="Everloop's address.")
        key: str = Field("", description="A key of Everloop's that may act for others.")

    def __init__(self):
        self.valves = self.Valves()

    async def event(self, event):
        """Send a rating that was given or changed, and take back one that was deleted."""
        feedback_id = (event.get("subject") or {}).get("id")
        if event["event"] in ("feedback.created", "feedback.updated"):
            feedback = await Feedbacks.get_feedback_by_id(id=feedback_id)
            data, message_id = feedback.data or {}, (feedback.meta or {}).get("message_id")
            signals = [{"kind": "thumb", "value": THUMBS.get(data.get("rating"), 0)}]
            if data.get("comment"):
                signals.append({"kind": "comment", "text": data["comment"]})
            about = _remember(feedback_id, message_id, f"open-webui {feedback.user_id}")
            await self._send(about, signals, feedback_id, feedback.updated_at)
        elif event["event"] == "feedback.deleted":
            withdrawals = [{"kind": kind, "value": 0} for kind in ("thumb", "comment")]
            await self._send(_rated(feedback_id), withdrawals, feedback_id, "deleted")

    async def _send(self, about, signals, *when):
        if about is None:  # an answer of another model, or from before this was installed
            return
        episode_id, user = about
        async with httpx.AsyncClient(headers={"Authorization": f"Bearer {self.valves.key}"}) as client:
            for signal in signals:
                # The same rating sent twice is one signal; a changed one is another, which stands instead of it.
                signal |= {"episode_id": episode_id, "user": user, "idempotency_key": _key(*when, signal)}
                response = await client.post(f"{self.valves.url}/feedback", json=signal)
                response.raise_for_status()


def _remember(feedback_id, message_id, user):
    """Return the episode that a message is, and whose rating it is; keep both, for when the rating is deleted."""
    with closing(sqlite3.connect(DATABASE, timeout=5)) as database, database:
        database.execute("CREATE TABLE IF NOT EXISTS episodes (message_id TEXT PRIMARY KEY, episode_id TEXT)")
        database.execute("CREATE TABLE IF NOT EXISTS rated (id TEXT PRIMARY KEY, episode_id TEXT, user TEXT)")
        row = database.execute("SELECT episode_id FROM episodes WHERE message_id = ?", (message_id,)).fetchone()
        if row is None:
            return None
        database.execute("INSERT OR REPLACE INTO rated VALUES (?, ?, ?)", (feedback_id, row[0], user))
    return row[0], user


def _rated(feedback_id):
    with closing(sqlite3.connect(DATABASE, timeout=5)) as database:
        return database.execute("SELECT episode_id, user FROM rated WHERE id = ?", (feedback_id,)).fetchone()


def _key(*parts):
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
