"""Where keys, tokens and passwords stand in a text.

Every pattern is written so that a search stays linear: a repeated class is bounded, or ends the pattern, or
starts only where its class starts. The shapes are the issuers' own (GitHub's token prefixes, AWS's key identifiers,
RFC 7519 for JWT, RFC 7468 for PEM).
"""

from __future__ import annotations

import re
from collections.abc import Iterator

# A token that its issuer made recognisable. Those that could begin an ordinary word must also hold a digit.
_TOKENS = re.compile(
    r"""
      (?<![A-Za-z0-9])(?P<wordlike>sk-[A-Za-z0-9_-]{16,}|hf_[A-Za-z0-9]{20,}|glpat-[A-Za-z0-9_-]{16,}
        |[rsp]k_(?:live|test)_[A-Za-z0-9]{10,}|npm_[A-Za-z0-9]{30,}|pypi-[A-Za-z0-9_-]{30,})
    | gh[opusr]_[A-Za-z0-9]{20,}
    | github_pat_[A-Za-z0-9_]{20,}
    | (?<![A-Za-z0-9])(?:AKIA|ASIA)[A-Z0-9]{16}(?![A-Za-z0-9])
    | xox[abeoprs]-[A-Za-z0-9-]{10,}
    | (?<![A-Za-z0-9])xapp-[A-Za-z0-9-]{20,}
    | AIza[A-Za-z0-9_-]{30,}
    | (?<![A-Za-z0-9_-])eyJ[A-Za-z0-9_-]{6,}+\.[A-Za-z0-9_-]{6,}+(?:\.[A-Za-z0-9_-]*+)?
    """,
    re.VERBOSE,
)

_HEADER = re.compile(
    r"""
      (?i:authorization)["']?[ \t]{0,3}[:=][ \t]{0,3}["']?(?i:bearer|basic|token|apikey)[ \t]{1,3}
        (?P<sure>[A-Za-z0-9._~+/=:-]{6,})
    | \b(?i:bearer|basic)[ \t]{1,3}(?P<likely>[A-Za-z0-9._~+/=-]{12,})
    | ://(?P<login>[^\s/:@\[\]]{0,64}:[^\s/@\[\]]{1,128})@
    """,
    re.VERBOSE,
)

_ASSIGNMENT = re.compile(
    r"""
    (?i:(?P<key>password|passwd|passphrase|pwd|(?:api|access|secret|private|account|signing|encryption)[_\- ]?key
      |client[_-]?secret|(?:access|auth|refresh|session|bearer|api)[_-]?token|(?<![a-z])(?:secret|token|passcode)))
    ["'`]?[ \t]{0,8}(?P<sign>:=|=>|={1,2}|:(?:[ ]?(?:str|string)[ ]?=)?)[ \t]{0,8}
    (?:"(?P<double>[^"\n]{1,4096})"|'(?P<single>[^'\n]{1,4096})'|`(?P<back>[^`\n]{1,4096})`
      |(?P<bare>[^\s"'`,;&<>(){}\[\]]{4,}))
    """,
    re.VERBOSE,
)

_PEM_BEGIN = re.compile(r"-----BEGIN (?:[A-Z0-9]{1,12} ){0,4}PRIVATE KEY(?: BLOCK)?-----")
_PEM_END = re.compile(r"-----END (?:[A-Z0-9]{1,12} ){0,4}PRIVATE KEY(?: BLOCK)?-----")
_PEM_BODY = re.compile(r"(?:\s|\\n)*+(?:[A-Za-z0-9+/=]{16,}+(?:\s|\\n)*+)*+")

_NOT_A_VALUE = re.compile(r"(?i:none|null|true|false|undefined|required|optional|string)|[$%*.x_-]+|\$\w+")
_NAME_IN_CODE = re.compile(r"[A-Za-z_][\w.]*")


def find_credentials(text: str) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of each credential; spans may overlap.

    Of an assignment the value alone is meant, so that what remains still reads as what it was.
    """
    yield from _private_keys(text)
    for match in _TOKENS.finditer(text):
        if match["wordlike"] is None or _has_digit(match["wordlike"]):
            yield match.span()
    for match in _HEADER.finditer(text):
        group = match.lastgroup
        assert group is not None
        if group != "likely" or _has_digit(match[group]) or match[group].endswith("="):
            yield match.span(group)
    for match in _ASSIGNMENT.finditer(text):
        group = match.lastgroup
        assert group is not None
        if _is_value(text, match, group):
            yield match.span(group)


def _private_keys(text: str) -> Iterator[tuple[int, int]]:
    position, ends_left = 0, True
    while begin := _PEM_BEGIN.search(text, position):
        # Without the memory that no end is left, many beginnings would each search to the end of the text.
        end = _PEM_END.search(text, begin.end()) if ends_left else None
        ends_left = end is not None
        body = end or _PEM_BODY.match(text, begin.end())
        assert body is not None  # the body may be empty
        position = body.end()
        yield begin.start(), position


def _has_digit(token: str) -> bool:
    return any(character.isdigit() for character in token)


def _is_value(text: str, match: re.Match[str], group: str) -> bool:
    value = match[group]
    is_token = match["key"].lower().endswith("token")  # a word with other meanings: a token of text, of a parser
    if _NOT_A_VALUE.fullmatch(value) or len(value) < (8 if is_token else 4):
        return False
    if group != "bare":
        return not (is_token and " " in value)
    following = text[match.end(group) : match.end(group) + 1]
    if following and following in "([{":
        return False  # a call or an index: password = read(...), key = os.environ[...]
    if _has_digit(value):
        # A short number is rather a length: `password: 4096`.
        return not value.isdigit() or (len(value) >= 6 and not is_token)
    # Without a digit it is a value only in the tight form of a shell, an .ini file or a query; `password: str`
    # is an annotation, and `password=user.password` and `login(password=secret)` name variables.
    is_tight = text[match.end("key") : match.start(group)] == "=" and following not in (",", ")")
    is_name = not value.isalpha() and _NAME_IN_CODE.fullmatch(value)
    return is_tight and len(value) >= 6 and not is_name and not is_token
