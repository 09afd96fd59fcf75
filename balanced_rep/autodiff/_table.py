"""The rules as a table for the documentation, from the registry."""

from __future__ import annotations

from balanced_rep.autodiff import _rules as _rules  # registers the rules
from balanced_rep.autodiff._registry import RULES

__all__ = ["rules_table"]

KINDS = {
    "linear": "one call on primal and tangents together",
    "pointwise": "derivative once per element, one product per tangent",
    "norm": "statistics once, two averages per tangent",
    "attention": "softmax once, scores in blocks",
    "view": "the same on every slot; views stay views",
    "structure": "the same on every slot",
    "composite": "written in functions that have rules",
}


def rules_table() -> str:
    """Markdown: one row per kind and formula."""
    rows: dict[tuple[str, str], list[str]] = {}
    for rule in RULES.values():
        if rule.kind in KINDS:
            names = rows.setdefault((rule.kind, rule.formula), [])
            if rule.name not in names:
                names.append(rule.name)
    lines = ["| how | functions | tangent |", "|---|---|---|"]
    for kind, how in KINDS.items():
        for (k, formula), names in sorted(rows.items(), key=lambda row: sorted(row[1])):
            if k == kind:
                listed = ", ".join(f"`{name}`" for name in sorted(names))
                tangent = formula.replace("|", "\\|")
                lines.append(f"| {how} | {listed} | `{tangent}` |")
    return "\n".join(lines)
