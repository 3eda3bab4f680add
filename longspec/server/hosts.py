"""Who reaches a server, by the host that it listens on; asked before torch is loaded, and so without anything heavy."""

from __future__ import annotations

import ipaddress

__all__ = ["is_loopback", "names"]


def is_loopback(host: str) -> bool:
    """Only this machine reaches a server that listens there."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def names(host: str) -> frozenset[str] | None:
    """What requests may call a server that listens there; None where others have names for it, and it has a key."""
    return frozenset({"localhost", "127.0.0.1", "::1", host.lower()}) if is_loopback(host) else None
