"""Variants of a test that wait for the slow tier."""

from typing import Any

import pytest


def slow(*values: Any, name: str | None = None) -> Any:
    """Parameters of one variant, behind the slow marker."""
    return pytest.param(*values, marks=pytest.mark.slow, id=name)
