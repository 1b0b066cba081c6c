"""Names of people in a text: an optional extra, since no pattern knows a name and a model costs memory and time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

from infra.errors import SetupError

CHUNK_CHARS = 100_000  # spaCy refuses texts above a million characters, and its memory grows with the length


class NameFinder(Protocol):
    """Finds names of people."""

    def find(self, text: str) -> Iterable[tuple[int, int]]:
        """Return (start, end) of each name, in characters."""
        ...


class PresidioNames:
    """Names by Microsoft Presidio's analyzer over a spaCy model.

    Parameters
    ----------
    model
        Name or path of an installed spaCy model with a named-entity recogniser; it is never downloaded.
    language
        Language code of the model.
    min_score
        Least score, from 0 to 1, that counts. Presidio gives 0.85 to all that a spaCy model finds.

    Raises
    ------
    SetupError
        The extra (``names_extra_missing``) or the model (``names_model_missing``) is not installed.
    """

    def __init__(self, model: str = "en_core_web_sm", *, language: str = "en", min_score: float = 0.5) -> None:
        self._language = language
        self._min_score = min_score
        self._analyzer = _analyzer(model, language)

    def find(self, text: str) -> Iterator[tuple[int, int]]:
        """Yield (start, end) of each name, in characters."""
        for offset, chunk in _chunks(text):
            found = self._analyzer.analyze(
                chunk, language=self._language, entities=["PERSON"], score_threshold=self._min_score
            )
            for result in found:
                yield offset + result.start, offset + result.end


def _analyzer(model: str, language: str) -> Any:
    try:
        import spacy.util
        from presidio_analyzer import AnalyzerEngine, RecognizerRegistry
        from presidio_analyzer.nlp_engine import SpacyNlpEngine
        from presidio_analyzer.predefined_recognizers import SpacyRecognizer
    except ImportError as error:
        raise SetupError(
            "Redacting names needs Presidio, which is not installed. Run: pip install 'everloop[names]', and "
            "install a spaCy model such as en_core_web_sm.",
            code="names_extra_missing",
        ) from error
    # Presidio would try to download a model that is missing, in the middle of a run.
    if not (spacy.util.is_package(model) or Path(model).exists()):
        raise SetupError(
            f"The spaCy model {model!r} is not installed. Install it with pip, or name another.",
            code="names_model_missing",
        )
    person = SpacyRecognizer(supported_language=language, supported_entities=["PERSON"])
    return AnalyzerEngine(
        registry=RecognizerRegistry(recognizers=[person], supported_languages=[language]),
        nlp_engine=SpacyNlpEngine(models=[{"lang_code": language, "model_name": model}]),
        supported_languages=[language],
    )


def _chunks(text: str) -> Iterator[tuple[int, str]]:
    start = 0
    while start < len(text):
        end = start + CHUNK_CHARS
        if end < len(text):
            cut = max(text.rfind("\n", start, end), text.rfind(" ", start, end))
            end = cut + 1 if cut > start else end
        yield start, text[start:end]
        start = end
