"""Multi-tangent forward mode: a primal and K tangents through an unmodified model in one pass."""

from balanced_rep.autodiff._dual import Dual, dual
from balanced_rep.autodiff._errors import FallbackError, UnsupportedError
from balanced_rep.autodiff._explain import Explanation, explain
from balanced_rep.autodiff._jvp import jvp
from balanced_rep.autodiff._registry import RULES, Rule, register_rule
from balanced_rep.autodiff._trace import trace

__all__ = [
    "RULES",
    "Dual",
    "Explanation",
    "FallbackError",
    "Rule",
    "UnsupportedError",
    "dual",
    "explain",
    "jvp",
    "register_rule",
    "trace",
]
