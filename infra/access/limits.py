"""How much somebody may ask for. Each API process counts for itself, in memory: no request writes anything."""

from __future__ import annotations

import ipaddress
import math
import time

from limits import RateLimitItem, RateLimitItemPerHour, RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import FixedWindowRateLimiter

from infra.access.roles import Caller
from infra.errors import TooManyError
from infra.settings import Settings

SIGN_INS_PER_NAME = 60  # so that nobody is kept out by whoever tries their name, and no password is found


class Limits:
    """Counts requests a minute and tokens an hour, for each user and key, and tries to sign in.

    Whoever acts for others is limited by what their key says only: who is behind it, it has to limit itself.
    """

    def __init__(self, settings: Settings) -> None:
        self._counter = FixedWindowRateLimiter(MemoryStorage())
        self._requests = _per_minute(settings.requests_per_minute)
        self._tokens = RateLimitItemPerHour(settings.tokens_per_hour) if settings.tokens_per_hour else None
        self._sign_ins = RateLimitItemPerMinute(settings.sign_ins_per_minute)
        self._of_name = RateLimitItemPerMinute(SIGN_INS_PER_NAME)

    def count_request(self, caller: Caller) -> None:
        """Count a request.

        Raises
        ------
        TooManyError
        """
        if (of_key := _per_minute(caller.requests_per_minute)) and caller.key_id:
            self._count(of_key, "requests", caller.key_id)
        if self._requests and caller.account_id and not caller.acts_for_others:
            self._count(self._requests, "requests", caller.account_id)

    def check_tokens(self, caller: Caller) -> None:
        """Refuse whoever has used up their tokens of this hour.

        Raises
        ------
        TooManyError
            Code ``too_many_tokens``.
        """
        if self._tokens and caller.account_id and not caller.acts_for_others:
            names = ("tokens", caller.account_id)
            if not self._counter.test(self._tokens, *names):
                raise self._refusal(
                    self._tokens,
                    names,
                    f"These were your {self._tokens.amount} tokens of this hour.",
                    "too_many_tokens",
                )

    def standing(self, caller: Caller) -> dict[str, str]:
        """Return what a caller may still ask for, as headers of OpenAI's API; empty where nothing is limited."""
        counted: dict[str, tuple[RateLimitItem, tuple[str, ...]]] = {}
        if caller.account_id and not caller.acts_for_others:
            if self._requests:
                counted["requests"] = self._requests, ("requests", caller.account_id)
            if self._tokens:
                counted["tokens"] = self._tokens, ("tokens", caller.account_id)
        if (of_key := _per_minute(caller.requests_per_minute)) and caller.key_id:
            counted["requests"] = of_key, ("requests", caller.key_id)
        headers = {}
        for what, (limit, names) in counted.items():
            stats = self._counter.get_window_stats(limit, *names)
            headers[f"x-ratelimit-limit-{what}"] = str(limit.amount)
            headers[f"x-ratelimit-remaining-{what}"] = str(max(stats.remaining, 0))
            headers[f"x-ratelimit-reset-{what}"] = f"{max(0, math.ceil(stats.reset_time - time.time()))}s"
        return headers

    def count_tokens(self, caller: Caller, num_tokens: int) -> None:
        """Note what an answer took, its question included."""
        if self._tokens and caller.account_id and not caller.acts_for_others:
            self._counter.hit(self._tokens, "tokens", caller.account_id, cost=num_tokens)

    def count_sign_in(self, address: str, name: str | None = None) -> None:
        """Count a try to sign in: passwords cannot be guessed by trying.

        Raises
        ------
        TooManyError
        """
        self._count(self._sign_ins, "sign-in from", network_of(address))
        if name is not None:
            self._count(self._of_name, "sign-in of", name.strip().casefold())

    def _count(self, limit: RateLimitItem, *names: str) -> None:
        if not self._counter.hit(limit, *names):
            told = f"That was more than {limit.amount} in a minute."
            raise self._refusal(limit, names, told, "too_many_requests")

    def _refusal(self, limit: RateLimitItem, names: tuple[str, ...], message: str, code: str) -> TooManyError:
        reset_at_s = self._counter.get_window_stats(limit, *names).reset_time
        return TooManyError(message, retry_after_s=max(1, math.ceil(reset_at_s - time.time())), code=code)


def network_of(address: str) -> str:
    """Return what one customer of a network has: an IPv4 address, or an IPv6 /64.

    Examples
    --------
    >>> network_of("2001:db8::1"), network_of("198.51.100.7"), network_of("")
    ('2001:db8::/64', '198.51.100.7', '')
    """
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address
    return str(ipaddress.ip_network(f"{parsed}/64", strict=False)) if parsed.version == 6 else address


def _per_minute(amount: int | None) -> RateLimitItem | None:
    return RateLimitItemPerMinute(amount) if amount else None
