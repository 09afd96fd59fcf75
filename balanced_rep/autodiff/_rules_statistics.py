"""Representation statistics: their references are plain torch, where every function finds its own rule."""

from __future__ import annotations

import torch

from balanced_rep.autodiff._registry import RULES, Rule
from balanced_rep.ops.energy_entropy import ENERGY_ENTROPY
from balanced_rep.ops.moments import MOMENTS

for _spec in (MOMENTS, ENERGY_ENTROPY):
    RULES[getattr(torch.ops.balanced_rep, _spec.name)] = Rule(
        _spec.name, "composite", _spec.reference, "the reference, function by function"
    )
