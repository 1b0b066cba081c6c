"""Each parameter of OpenAI's API is taken, taken in some of its values, or refused by name; none is passed over."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from infra.text import CleanText

UNSUPPORTED = "unsupported_parameter"
UNKNOWN = "unknown_parameter"


class Only(NamedTuple):
    """The values in which a parameter changes nothing here, and what to do for others."""

    values: tuple[Any, ...]
    instead: str


class OpenAIRequest(BaseModel):
    """A body of OpenAI's API, or a part of one. What is null counts as not given, as it does there.

    Attributes
    ----------
    refused
        Parameters of OpenAI's that are not taken: what to do instead.
    only
        Those that are taken in some of their values, which change nothing; they are not handed on.
    own
        Fields that are ours, not OpenAI's.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    refused: ClassVar[Mapping[str, str]] = {}
    only: ClassVar[Mapping[str, Only]] = {}
    own: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def names(cls) -> frozenset[str]:
        """Return the parameters that are taken and handed on, as requests name them."""
        return frozenset(field.alias or name for name, field in cls.model_fields.items())

    @model_validator(mode="before")
    @classmethod
    def _each_name_is_decided(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        said = {name: value for name, value in given.items() if value is not None}
        for name, value in list(said.items()):
            if name in cls.refused:
                raise unsupported(str(name), cls.refused[name])
            if name in cls.only:
                # 1 is no True, and 1.0 no 1: a value is what JSON says it is.
                if not any(type(value) is type(one) and value == one for one in cls.only[name].values):
                    raise unsupported(str(name), cls.only[name].instead)
                del said[name]
            elif name not in cls.names():
                raise PydanticCustomError(
                    UNKNOWN, "There is no such parameter; see docs/api-compatibility.md.", {"param": str(name)}
                )
        return said


def mistaken(param: str, why: str) -> PydanticCustomError:
    """Return the error of a parameter that contradicts another."""
    return PydanticCustomError("mistaken", "{why}", {"param": param, "why": why})


def unsupported(param: str, instead: str) -> PydanticCustomError:
    """Return the error of a parameter that OpenAI has and Everloop has not."""
    return PydanticCustomError(UNSUPPORTED, "{instead}", {"param": param, "instead": instead})


TEXT_PARTS = ("text", "input_text", "output_text")


def as_text(content: Any) -> Any:
    """Return the text of a message's parts; what is no list is returned as it is.

    Raises
    ------
    PydanticCustomError
        Code ``unsupported_parameter`` for a part that is no text.
    """
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in TEXT_PARTS:
            raise unsupported("type", f"Only parts of type text are read, not {str(kind)[:40]!r}: send text.")
        if not isinstance(part.get("text"), str):
            raise ValueError("A part of type text has a `text`.")
        texts.append(part["text"])
    return "".join(texts)


Content = Annotated[CleanText, BeforeValidator(as_text), Field(min_length=1)]
Speaker = Annotated[
    Literal["system", "user", "assistant"],
    BeforeValidator(lambda role: "system" if role == "developer" else role),
]
Metadata = Annotated[
    dict[Annotated[CleanText, Field(max_length=64)], Annotated[CleanText, Field(max_length=512)]],
    Field(max_length=16),
]
