"""Where e-mail addresses, phone numbers, payment cards and addresses of machines stand in a text.

Each finder takes time linear in the text: its pattern finds maximal runs, and the rules are applied to a run once.
"""

from __future__ import annotations

import ipaddress
import re
from collections import deque
from collections.abc import Iterator

from phonenumbers import (
    SUPPORTED_REGIONS,
    Leniency,
    NumberParseException,
    PhoneNumberMatcher,
    is_valid_number,
    parse,
)

from infra.errors import InvalidRequestError

_DOMAIN = re.compile(r"@(?:(?>[\w-]{1,63})\.)+(?:xn--[a-z0-9-]{2,59}|[^\W\d_]{2,24}+)(?![(\w])")
_LOCAL_MARKS = "._%+-'"
_FILE_SUFFIXES = (".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp")  # icon@2x.png is a picture

_PLUS = re.compile(r"[+\uff0b]")
_LEAST_PHONE_DIGITS = 6
_MOST_PHONE_DIGITS = 15  # ITU-T E.164
_PLUS_RUN = re.compile(r"[+\uff0b] ?\(?[0-9]{1,15}+(?:[ \t\u00a0().\-/]{1,3}[0-9]{1,15}+){0,14}")
# What the matcher takes for a number and is none: a decimal fraction, a date, a range of years.
_NO_PHONE = re.compile(
    r"(?s)\d+[.,]\d+"
    r"|.*\b(?:19|20)\d\d([-./])(?:0[1-9]|1[0-2])\1(?:0[1-9]|[12]\d|3[01])\b.*"
    r"|.*\b(?:0?[1-9]|[12]\d|3[01])([-./])(?:0?[1-9]|[12]\d|3[01])\2(?:19|20)\d\d\b.*"
    r"|(?:19|20)\d\d ?[-\u2013/] ?(?:19|20)\d\d"
)
_CLOSING = re.compile(r"[)\]]")
_FRACTION = re.compile(r"\d[.,]")
_ISBN = re.compile(r"(?i:isbn)(?:-1[03])?:?\s{0,3}[\dX][\dX -]{8,16}|(?<!\d)97[89](?:[ -]?\d){10}(?!\d)")

_SPACE = r"[ \t\u00a0\u202f]"
# Issuers print groups of four or more; only the last group may be shorter. A row of small numbers is no card.
_CARD_GROUP_END = r"(?![A-Za-z]|\.\d)"  # else it is a part of a word or of a decimal fraction
_CARD_RUN = re.compile(
    rf"(?<![A-Za-z0-9])(?<!\d[.,])[0-9]{{4,}}+{_CARD_GROUP_END}"
    rf"(?:(?:{_SPACE}|{_SPACE}?[-\u2010-\u2013]{_SPACE}?)[0-9]++{_CARD_GROUP_END})*+"
)
_GROUP = re.compile(r"[0-9]+")
_CARD_DIGITS = range(13, 20)
_CARD_START = re.compile(r"1(?=[0-9]{14}\Z)|2131|2014|2149|220[0-4]|222[1-9]|22[3-9]|2[3-6]|27[01]|2720|[3-9]")
_BOOKLAND = re.compile(r"97[89][0-9]{10}")  # an ISBN without its dashes

_IPV4 = re.compile(r"(?<![\w.])[0-9]{1,3}(?:\.[0-9]{1,3}){3}(?![\w]|\.\w)")
_IPV6 = re.compile(r"(?<![0-9A-Fa-f:.])[0-9A-Fa-f:]{2,}+(?!\w)")
_MAC = re.compile(
    r"(?<!\w)(?<!\b[0-9A-Fa-f]{2}[:-])(?:[0-9A-Fa-f]{2}(?::[0-9A-Fa-f]{2}){5}|[0-9A-Fa-f]{2}(?:-[0-9A-Fa-f]{2}){5}"
    r"|[0-9A-Fa-f]{4}\.[0-9A-Fa-f]{4}\.[0-9A-Fa-f]{4})(?!\w|[:-][0-9A-Fa-f]{2}\b)"
)
_VERSION_BEFORE = re.compile(r"(?:\b(?:version|ver|v|release|build|section|chapter)\.?:?|[=<>~^!]=|§)\s?\Z", re.I)
_VERSION_CHARS = 12  # the longest of these words and what may follow it


def find_emails(text: str) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of each e-mail address."""
    for match in _DOMAIN.finditer(text):
        start = match.start()
        while start and (text[start - 1].isalnum() or text[start - 1] in _LOCAL_MARKS):
            start -= 1
        while text[start] in _LOCAL_MARKS:
            start += 1
        local = text[start : match.start()]
        is_clone_url = local == "git" and text[match.end() : match.end() + 1] == ":"
        if local and not is_clone_url and not match[0].lower().endswith(_FILE_SUFFIXES):
            yield start, match.end()


def find_phones(text: str, region: str | None = None) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of each valid phone number, by the rules of libphonenumber.

    Parameters
    ----------
    text
        Where to search.
    region
        ISO 3166 code of the country whose national numbers are found too.

    Raises
    ------
    InvalidRequestError
        libphonenumber does not know `region`.
    """
    if region is not None and region not in SUPPORTED_REGIONS:
        raise InvalidRequestError(
            f"No phone numbers are known for region {region!r}; use an ISO 3166 code such as US.", param="region"
        )
    if region is None and not _PLUS.search(text):
        return
    if sum(map(str.isdigit, text)) < _LEAST_PHONE_DIGITS:
        return
    yield from _numbers_before_others(text)
    books = deque(match.span() for match in _ISBN.finditer(text))
    # The matcher gives up after a number of tries, and all that follows would stay; the length is a bound that it
    # does not reach.
    matcher = PhoneNumberMatcher(text, region, Leniency.VALID, max_tries=10 * len(text))
    for match in matcher:
        while books and books[0][1] <= match.start:
            books.popleft()
        in_book = bool(books) and books[0][0] < match.end
        is_fraction = _FRACTION.match(text, max(0, match.start - 2), match.start)
        if not in_book and not is_fraction and not _NO_PHONE.fullmatch(match.raw_string):
            # The bracket of "(+1 212 555 0123)" belongs to the sentence, that of "(212) 555-0123" to the number.
            is_outside = match.raw_string[0] in "([" and not _CLOSING.search(match.raw_string)
            yield match.start + is_outside, match.end


def _numbers_before_others(text: str) -> Iterator[tuple[int, int]]:
    """Yield numbers with a plus that other digits follow, as in "+1 212 555 0123 3 times".

    The matcher takes all of it for one number, which is not valid, and would leave it.
    """
    for run in _PLUS_RUN.finditer(text):
        ends = [group.end() for group in _GROUP.finditer(text, *run.span())]
        for end in reversed(ends[:-1]):  # the whole is the matcher's
            written = text[run.start() : end]
            num_digits = sum(map(str.isdigit, written))
            if num_digits < _LEAST_PHONE_DIGITS:
                break
            if num_digits <= _MOST_PHONE_DIGITS and _is_phone(written):
                yield run.start(), end
                break


def _is_phone(written: str) -> bool:
    try:
        return is_valid_number(parse(written))
    except NumberParseException:
        return False


def find_cards(text: str) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of each payment card number: 13 to 19 digits, grouped or not, that pass Luhn's check."""
    for run in _CARD_RUN.finditer(text):
        groups = [group.span() for group in _GROUP.finditer(text, *run.span())]
        for first in range(len(groups)):
            # Every beginning is tried, also inside a find: a number before a card can make a false one with its
            # first groups, and the last would stay.
            last = _card_end(text, groups, first)
            if last is not None:
                yield groups[first][0], groups[last][1]


def _card_end(text: str, groups: list[tuple[int, int]], first: int) -> int | None:
    """Return the last group of the longest card number that begins with group `first`."""
    digits, found = "", None
    for index in range(first, len(groups)):
        start, end = groups[index]
        digits += text[start : min(end, start + _CARD_DIGITS.stop)]
        if len(digits) in _CARD_DIGITS and _is_card(digits):
            found = index
        if end - start < 4 or len(digits) >= _CARD_DIGITS.stop:
            break
    return found


def _is_card(digits: str) -> bool:
    if not _CARD_START.match(digits) or _BOOKLAND.fullmatch(digits):
        return False
    doubled = (2 * int(digit) for digit in digits[-2::-2])
    return (sum(map(int, digits[::-2])) + sum(n - 9 if n > 9 else n for n in doubled)) % 10 == 0


def find_machine_addresses(text: str) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of each IPv4, IPv6 and MAC address."""
    for match in _IPV4.finditer(text):
        before = text[max(0, match.start() - _VERSION_CHARS) : match.start()]
        if _is_ip(match[0]) and not _VERSION_BEFORE.search(before):
            yield match.span()
    yield from _ipv6_addresses(text)
    for match in _MAC.finditer(text):
        # Digits alone, with dashes or dots, are rather a date, a draw of numbers or a fraction.
        if ":" in match[0] or any(character.isalpha() for character in match[0]):
            yield match.span()


def _ipv6_addresses(text: str) -> Iterator[tuple[int, int]]:
    for match in _IPV6.finditer(text):
        start, candidate = match.start(), match[0]
        is_glued = start > 0 and (text[start - 1].isalnum() or text[start - 1] == "_")
        if is_glued or re.match(":(?!:)", candidate):  # "remote:2001:db8::1", of which the run is "e:2001:db8::1"
            cut = candidate.find(":") + 1
            start, candidate = start + cut, candidate[cut:]
        if not _is_ip(candidate):
            candidate = candidate.rstrip(":")  # the colon of a sentence
        if _is_ip(candidate) and _is_likely_ipv6(candidate):
            yield start, start + len(candidate)


def _is_ip(candidate: str) -> bool:
    try:
        ipaddress.ip_address(candidate)
    except ValueError:
        return False
    return True


def _is_likely_ipv6(candidate: str) -> bool:
    """Tell an address from code: ``a[::2]``, ``x[1::2]`` and ``fade::add`` are valid addresses too."""
    groups = [group for group in candidate.split(":") if group]
    if len(groups) > 4 or (len(groups) > 2 and any(character.isdigit() for character in candidate)):
        return True
    first = int(groups[0], 16) if groups and not candidate.startswith(":") else 0
    # In use are global unicast, unique local, link-local and multicast addresses (RFC 4291, RFC 4193).
    return 0x2000 <= first < 0x4000 or first >> 9 == 0xFC00 >> 9 or first >> 6 == 0xFE80 >> 6 or first >> 8 == 0xFF
