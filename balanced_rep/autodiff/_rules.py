"""Importing this registers every rule of the package."""

from balanced_rep.autodiff import (
    _rules_attention,
    _rules_linear,
    _rules_norm,
    _rules_pieces,
    _rules_pointwise,
    _rules_statistics,
    _rules_structure,
    _rules_views,
)

__all__ = [
    "_rules_attention", "_rules_linear", "_rules_norm", "_rules_pieces", "_rules_pointwise", "_rules_statistics",
    "_rules_structure", "_rules_views",
]  # fmt: skip
