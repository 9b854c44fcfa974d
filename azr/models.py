"""Names of models: aliases, the embedded one's description, and whether the hub can be asked for the others."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import getproxies

ALIASES = {
    "tiny": str(Path(__file__).with_name("tiny")),
    **{f"qwen-{size.lower()}": f"Qwen/Qwen2.5-Coder-{size}" for size in ("0.5B", "1.5B", "3B", "7B", "14B")},
}


def portable(path: str) -> str:
    """What to write of where a model lies: "tiny" for the embedded one, which moves with the checkout."""
    return "tiny" if path == ALIASES["tiny"] else path


def model_path(model: str) -> str:
    """The hub id or directory behind an alias; anything else as it is."""
    return ALIASES.get(model, model)


def base_description(model: str) -> dict | None:
    """base.json of a model that was trained on one wording of the prompts (the embedded one); None for others."""
    path = Path(model_path(model)) / "base.json"
    return json.loads(path.read_text()) if path.is_file() else None


def only_cached(name: str) -> bool:
    """Whether the hub's client would retry for half a minute a file before it says that there is no way to it.

    True, with a line on stderr, if there is no way to the hub and `name` can only come from the local cache."""
    from huggingface_hub.constants import ENDPOINT

    if getproxies():
        return False
    try:
        socket.getaddrinfo(urlparse(ENDPOINT).hostname, 443)
    except OSError:
        print(f"{ENDPOINT} cannot be reached: looking for {name} in the local cache only", file=sys.stderr)
        return True
    return False
