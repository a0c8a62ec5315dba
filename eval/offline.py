"""What must be settled before lm-eval and the hub's libraries are imported: they read the environment only then."""

from __future__ import annotations

import os


def go_offline() -> None:
    """Keep the hub's libraries local, unless the user set otherwise, and silence their progress bars."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TQDM_DISABLE"):
        os.environ.setdefault(name, "1")
