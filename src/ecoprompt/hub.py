"""The Hugging Face Hub: whether it can be reached, and what is fetched from it."""

from __future__ import annotations

import re
import socket
import urllib.parse
from collections.abc import Iterable
from pathlib import Path

from ecoprompt.registry import EcopromptError, InputError, first_line

HUB_ID = re.compile(r"(?!.*(--|\.\.))\w[\w.-]*/\w[\w.-]*(?<![.-])", re.ASCII)
PATIENCE = 5.0
"""Seconds in which each address of the Hub has to answer."""


once = False
"""Whether a Hub that was out of reach is not asked again by this process, as commands want; set by the CLI."""
_reason: str | None = None


def out_of_reach() -> str | None:
    """Why the Hub cannot be reached, None if it can.

    A command is offline from then on, as under HF_HUB_OFFLINE: the Hub's client would try for every file for half a
    minute, and say so, before it takes what is cached.
    """
    global _reason
    from urllib.request import getproxies

    from huggingface_hub import constants

    if _reason is not None:
        return _reason
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    place = urllib.parse.urlsplit(constants.ENDPOINT)
    if {place.scheme, "all"} & getproxies().keys():
        return None
    port = place.port or (80 if place.scheme == "http" else 443)
    try:
        socket.create_connection((place.hostname, port), PATIENCE).close()
    except OSError as error:
        if once:
            constants.HF_HUB_OFFLINE, _reason = True, str(error)
        return str(error)
    return None


def check_at_hand(what: str, name: str, file: str = "config.json", instead: str = ", or name a folder") -> None:
    """Raises at once if `what`, the Hub's repository `name`, is not here, which its `file` tells, nor to be had."""
    from huggingface_hub import try_to_load_from_cache

    if not HUB_ID.fullmatch(name):
        raise InputError(f"{what}: no such folder, and not a Hub id (NAME/ID)")
    reason = out_of_reach()
    if reason is not None and try_to_load_from_cache(name, file) is None:
        raise EcopromptError(
            f"{what} is not here and the Hub cannot be reached ({reason}); download it where there is a network "
            f"(`hf download {name}`) and bring its cache here (HF_HOME; HF_HUB_OFFLINE=1 then asks no network){instead}"
        )


def fetch(what: str, name: str, files: Iterable[str], needed: str) -> Path:
    """The folder of a snapshot of `what`, the Hub's repository `name`, with these of its files and no others."""
    check_at_hand(what, name, needed)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(files)))
    # The client raises errors of several libraries; whichever it is, the files are not to be had.
    except Exception as error:
        raise EcopromptError(f"{what} is not to be had from the Hub: {first_line(error)}") from error
