"""What the training API may read: what it was sent, what it fetched, and one folder of the host's.

A request's `data` is a URL, or a path that Cog passes on as it is. Cog writes what it downloads
below a folder made here that no client can name, so a path elsewhere came from the client. Cog also
fetches from any address; an audit hook refuses those that only this machine can reach.
"""

import atexit
import ipaddress
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from alpaca.errors import UserError

FOLDER = "ALPACA_DATA_DIR"  # files below it may be named by path
LOCAL = "ALPACA_LOCAL_URLS"  # 1: also fetch from addresses of this machine and its link
DOWNLOADER = "cog.types"  # the module in which Cog fetches URLs


def protect() -> Path:
    """Keep Cog's downloads of this process apart, and restrict where they come from.

    Returns the folder of the downloads.
    """
    own = tempfile.mkdtemp(prefix="alpaca-inputs-")
    atexit.register(shutil.rmtree, own, ignore_errors=True)
    tempfile.tempdir = own
    sys.addaudithook(_check_connection)
    return Path(own)


def check(data: Path, downloads: Path, environment: Mapping[str, str] = os.environ) -> Path:
    """The file `data`, if a client may have it read.

    Raises:
        UserError: it is neither a download nor in the folder that ALPACA_DATA_DIR names.
    """
    found = data.resolve()  # of a link, what it names
    named = environment.get(FOLDER)
    allowed = [downloads.resolve(), *([Path(named).resolve()] if named else [])]
    if not any(found.is_relative_to(folder) for folder in allowed):
        raise UserError(
            f"data: {data} is a path of the server, which a client may not name.",
            "Send a URL, or the content as a data: URI. Files below the folder that the server's "
            f"variable {FOLDER} names may be named by path.",
        )
    return found


def _check_connection(event: str, arguments: tuple[Any, ...]) -> None:
    """Audit hook: refuse Cog's downloads from addresses of this machine and its link."""
    if event != "socket.connect" or os.environ.get(LOCAL) == "1" or not _downloading():
        return
    address = arguments[1]
    host = address[0] if isinstance(address, tuple) else ""
    try:
        ip = ipaddress.ip_address(str(host).partition("%")[0])
    except ValueError:
        ip = None  # a name, or a socket of the file system
    ip = getattr(ip, "ipv4_mapped", None) or ip
    if ip is None or ip.is_loopback or ip.is_link_local or ip.is_unspecified or ip.is_multicast:
        raise UserError(
            f"data: {host or 'a socket'} is an address of the server itself or of its link.",
            f"Use a URL that others can reach too, or start the server with {LOCAL}=1.",
        )


def _downloading() -> bool:
    """Whether Cog's download is what calls."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_globals.get("__name__") == DOWNLOADER:
            return True
        frame = frame.f_back
    return False
