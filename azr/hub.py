"""Whether the model hub can be reached: its client would retry for half a minute a file before it says so."""

from __future__ import annotations

import socket
import sys
from urllib.parse import urlparse
from urllib.request import getproxies


def only_cached(name: str) -> bool:
    """True, with a line on stderr, if there is no way to the hub and `name` can only come from the local cache."""
    from huggingface_hub.constants import ENDPOINT

    if getproxies():
        return False
    try:
        socket.getaddrinfo(urlparse(ENDPOINT).hostname, 443)
    except OSError:
        print(f"{ENDPOINT} cannot be reached: looking for {name} in the local cache only", file=sys.stderr)
        return True
    return False
