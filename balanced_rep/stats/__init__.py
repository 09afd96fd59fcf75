"""Representation statistics: mergeable moments of activations, and hooks that record them."""

from balanced_rep.stats._representation import RepresentationStats, cat, representation_stats

__all__ = ["RepresentationStats", "cat", "representation_stats"]
