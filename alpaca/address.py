"""Addresses of servers: which are this machine's own, and the URL of an OpenAI-compatible one."""

import ipaddress
from urllib.parse import urlsplit

from alpaca.errors import UserError


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server at `host`, an address or a name."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host.lower() == "localhost"
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def is_url(text: str) -> bool:
    """Whether a setting that may be a folder or an endpoint is an endpoint."""
    return text.startswith(("http://", "https://"))


def base_url(text: str, setting: str) -> str:
    """The endpoint's URL, without a slash at its end; one without a path gets /v1.

    Raises:
        UserError: it is no URL; `setting` is the flag or variable that holds it.
    """
    try:
        parts = urlsplit(text)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # brackets without an IPv6 address, a port that is no number
        usable = False
    if not usable or not text.isprintable() or " " in text:
        raise UserError(f"{setting} {text} is not a URL.", "Example: http://localhost:8000/v1")
    url = text.rstrip("/")
    return url if parts.path.strip("/") else url + "/v1"
