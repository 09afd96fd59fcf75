"""Representation statistics: mergeable moments of activations, and hooks that record them."""

from balanced_rep.stats._representation import RepresentationStats, cat, representation_stats
from balanced_rep.stats.record import Recording, record

__all__ = ["Recording", "RepresentationStats", "cat", "record", "representation_stats"]
