"""Where outpace keeps what it can make again: dense copies of models, compiled code, chosen shapes of drafts."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path | None:
    """The user's folder for it (`OUTPACE_CACHE`, else one in the cache of the system), or None: `OUTPACE_CACHE=off`."""
    asked = os.environ.get("OUTPACE_CACHE", "")
    if asked.lower() in ("off", "0", "none"):
        return None
    if asked:
        return Path(asked).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "outpace"
