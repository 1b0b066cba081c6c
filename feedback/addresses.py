"""The block of addresses that a signal came from: enough to see that a crowd is one machine, and no more."""

from __future__ import annotations

import ipaddress

from fastapi import Request

V4_BITS, V6_BITS = 24, 48


def client_address(request: Request) -> str:
    """Return the address of the client, as far as it can be known.

    Behind proxies that the settings trust, the client is the last address that the outermost of them saw.
    """
    client = request.client.host if request.client else ""
    trusted = request.app.state.settings.trusted_proxies
    if trusted:
        lines = ",".join(request.headers.getlist("x-forwarded-for"))  # a proxy may add to a line, or a line
        forwarded = [part.strip() for part in lines.split(",") if part.strip()]
        client = forwarded[-trusted] if len(forwarded) >= trusted else client
    return client


def address_block(request: Request) -> str | None:
    """Return the /24 (or, for IPv6, /48) network of the client; None for private addresses."""
    return block_of(client_address(request))


def block_of(address: str) -> str | None:
    """Return the network of an address, or None where it is private or none at all.

    Examples
    --------
    >>> block_of("8.8.4.4")
    '8.8.4.0/24'
    >>> block_of("127.0.0.1") is None
    True
    """
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return None
    if not parsed.is_global:
        return None
    bits = V4_BITS if parsed.version == 4 else V6_BITS
    return str(ipaddress.ip_network(f"{parsed}/{bits}", strict=False))
