"""What a run found: issues with their source line, and how to print them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from .parser import Instruction

__all__ = ["ExecutionError", "GpuIssues", "Issue", "Issues"]


class ExecutionError(RuntimeError):
    """The executor cannot go on: an opcode it does not know, a deadlock, a wrong call."""


class GpuIssues(AssertionError):
    """A run that was expected to be clean had issues; the text is the report."""

    def __init__(self, issues: Issues) -> None:
        super().__init__(f"\n{issues}")
        self.issues = issues


@dataclass
class Issue:
    """One kind of finding at one instruction.

    Attributes:
        kind: ``out-of-bounds``, ``misaligned``, ``uninitialised``, ``race``, ``barrier``, ``async``, ``shuffle``,
            ``trap``, or ``ambiguous``: lanes of one store whose values differ by rounding.
        instruction: Where it showed.
        detail: The first occurrence in words: space, addresses, threads.
        count: Threads that met it, over the whole launch.
    """

    kind: str
    instruction: Instruction
    detail: str
    count: int = 0

    def __str__(self) -> str:
        where = self.instruction.source or "no source line (compile with -lineinfo)"
        return (
            f"{self.kind.upper()} at {where}: {self.detail} ({self.count} x)\n"
            f"    PTX line {self.instruction.line}: {self.instruction.text}"
        )


@dataclass
class Issues:
    """All findings of a launch, one entry per kind and source line."""

    found: dict[tuple[str, str, str], Issue] = field(default_factory=dict)

    def add(self, kind: str, instruction: Instruction, detail: str, *, topic: str = "", count: int = 1) -> None:
        """Record a finding; ``topic`` separates findings of one kind at one source line."""
        key = (kind, topic, str(instruction.source or instruction.line))
        if key not in self.found:
            self.found[key] = Issue(kind, instruction, detail)
        self.found[key].count += count

    def __bool__(self) -> bool:
        return bool(self.found)

    def __iter__(self) -> Iterator[Issue]:
        return iter(self.found.values())

    def kinds(self) -> set[str]:
        return {issue.kind for issue in self}

    def __str__(self) -> str:
        return "\n".join(str(issue) for issue in self) or "no issues"
