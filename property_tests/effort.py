"""How many examples a test tries, as a share of what the Hypothesis profile says."""

from __future__ import annotations

from hypothesis import settings


def share(part: int, *, least: int = 4) -> settings:
    """Settings that try one in `part` of the profile's examples, and `least` at least."""
    profile = settings.default
    assert profile is not None
    return settings(max_examples=max(least, profile.max_examples // part))
