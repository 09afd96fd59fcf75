"""What can go wrong in forward mode, as types."""

from __future__ import annotations

__all__ = ["FallbackError", "UnsupportedError"]


class UnsupportedError(RuntimeError):
    """A tangent cannot be carried through a call, and zero would be wrong."""


class FallbackError(UnsupportedError):
    """``strict=True`` and a function has no rule."""
