"""The redactor of a run: the operator's choices, and what it found, counted by kind."""

from __future__ import annotations

from collections import Counter
from typing import Any, Self

from infra.settings import Settings
from trainer.redaction import NameFinder, PresidioNames, redact, redact_messages


class Redactor:
    """Takes personal data out of texts and counts what it took out; it logs nothing.

    Parameters
    ----------
    region
        Country (ISO code) whose national phone numbers are found too.
    names
        Finder of people's names; without it names stay.
    """

    def __init__(self, region: str | None = None, names: NameFinder | None = None) -> None:
        self.region = region
        self.names = names
        self._counts: Counter[str] = Counter()

    @classmethod
    def from_settings(cls, settings: Settings) -> Self:
        """Return the redactor that the operator asked for."""
        return cls(settings.phone_region, PresidioNames() if settings.redact_names else None)

    def text(self, text: str) -> str:
        """Return a text without personal data."""
        redacted = redact(text, region=self.region, names=self.names)
        self._counts += redacted.counts
        return redacted.text

    def messages(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return messages without personal data."""
        redacted, counts = redact_messages(messages, region=self.region, names=self.names)
        self._counts += counts
        return redacted

    def pop_counts(self) -> Counter[str]:
        """Return what was taken out since the last call, by kind."""
        counts, self._counts = self._counts, Counter()
        return counts
