"""What the documentation build adds to MkDocs: formulas as MathML, so that no page loads a script for them.

Formulas are written ``$...$`` and ``$$...$$`` in pages (as GitHub shows them) and ``:math:`...``` in docstrings.
"""

from __future__ import annotations

import re
from typing import Any

from latex2mathml.converter import convert

__all__ = ["on_page_content", "on_page_markdown"]

# Code is matched first, and left alone.
_PAGE = re.compile(
    r"(?P<code>^(?P<fence>```+|~~~+).*?^(?P=fence)|(?P<ticks>`+)(?!`).+?(?<!`)(?P=ticks)(?!`))"
    r"|\$\$(?P<block>.+?)\$\$|(?<![\\$\w])\$(?P<inline>[^\s$](?:(?!\n\n)[^$])*(?<![\s\\]))\$(?![\w$])",
    re.DOTALL | re.MULTILINE,
)
_ROLE_MATH = re.compile(r":math:<code>(.*?)</code>", re.DOTALL)
_ROLE_CODE = re.compile(r":(?:attr|class|data|exc|func|meth|mod):<code>[~.]?(.*?)</code>", re.DOTALL)
_ENTITIES = {"&lt;": "<", "&gt;": ">", "&amp;": "&"}
_BARS = {r"\lvert": ("⟦", "prefix"), r"\rvert": ("⟧", "postfix")}  # MathML must know which side a bar is on


def _mathml(latex: str, display: str = "inline") -> str:
    for command, (letter, _) in _BARS.items():
        latex = latex.replace(command, f" {letter} ")
    html = convert(latex, display=display)
    for letter, form in _BARS.values():
        html = re.sub(rf"<m([io])>{letter}</m\1>", f'<mo form="{form}" stretchy="false">&#124;</mo>', html)
    if unknown := re.search(r"<mi>(\\.*?|&)</mi>|[⟦⟧]", html):
        raise ValueError(f"cannot typeset {unknown[0]!r} in the formula {latex!r}")
    # In a span, because a line that begins with <math> would be a block of its own in Markdown.
    return f'<span class="formula">{html}</span>'


def _formula(match: re.Match[str]) -> str:
    if match["code"]:
        return match["code"]
    if match["block"]:
        return f'\n<div class="formula">{_mathml(match["block"].strip(), "block")}</div>\n'
    return _mathml(match["inline"])


def _docstring_formula(match: re.Match[str]) -> str:
    return _mathml(re.sub("&(?:lt|gt|amp);", lambda m: _ENTITIES[m[0]], match[1]))


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Formulas of a page to MathML."""
    return _PAGE.sub(_formula, markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Sphinx roles of docstrings: ``:math:`` to MathML, references to code."""
    return _ROLE_CODE.sub(r"<code>\1</code>", _ROLE_MATH.sub(_docstring_formula, html))
