"""The reachability of a listening address; used before torch is loaded, so it imports nothing heavy."""

from __future__ import annotations

import ipaddress

__all__ = ["is_loopback", "names"]


def is_loopback(host: str) -> bool:
    """Whether a server that listens there is reachable only from this machine."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def names(host: str) -> frozenset[str] | None:
    """The Host names allowed for a server that listens there; None (any) where it is reachable from elsewhere and has
    a key.
    """
    return frozenset({"localhost", "127.0.0.1", "::1", host.lower()}) if is_loopback(host) else None
