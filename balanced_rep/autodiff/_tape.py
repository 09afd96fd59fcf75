"""Primal results of linear layers, kept from one run to the next at the same point: further runs need only tangents."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from balanced_rep.autodiff._errors import UnsupportedError

__all__ = ["Tape", "TapeRun", "state_of"]


def state_of(*objects: Any) -> list[tuple[int, int]]:
    """Identity and version of every tensor that can be found in some objects: it changes when one is written.

    Looks into modules (parameters, buffers, whether they train), bound methods, partials, closures and pytrees.

    Args:
        *objects: What a function and its arguments are made of.

    Returns:
        Pairs that compare equal as long as nothing changes.
    """
    found: list[tuple[int, int]] = []
    seen: set[int] = set()

    def look(x: Any) -> None:
        if id(x) in seen:
            return
        seen.add(id(x))
        if isinstance(x, Tensor):
            found.append((id(x), 0 if x.is_inference() else x._version))
        elif isinstance(x, nn.Module):
            found.append((id(x), sum(module.training for module in x.modules())))
            for tensor in (*x.parameters(), *x.buffers()):
                look(tensor)
        elif isinstance(x, functools.partial):
            look((x.func, x.args, x.keywords))
        elif isinstance(x, tuple | list | dict):
            for part in x.values() if isinstance(x, dict) else x:
                look(part)
        else:
            look(getattr(x, "__self__", None))
            for cell in getattr(x, "__closure__", None) or ():
                with contextlib.suppress(ValueError):  # an empty cell
                    look(cell.cell_contents)

    look(objects)
    return found


class Tape:
    """What is kept.

    Args:
        limit: Bytes beyond which nothing is kept after all; ``None`` for no limit.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self.values: list[tuple[str, Tensor]] = []
        self.complete = False
        self.too_large = False

    @property
    def nbytes(self) -> int:
        """Bytes that are kept."""
        return sum(value.nbytes for _, value in self.values)

    def run(self) -> TapeRun:
        """A run that fills the tape, or reads it once it is complete."""
        return TapeRun(self)


class TapeRun:
    """One run along a tape; several threads may have one each.

    Args:
        tape: What is filled or read.
    """

    def __init__(self, tape: Tape) -> None:
        self.tape = tape
        self._reads = tape.complete
        self._at = 0
        self._bytes = 0
        self._new: list[tuple[str, Tensor]] = []

    def kept(self, name: str, compute: Callable[[], Tensor]) -> Tensor:
        """A primal result: what the tape holds at this place, else computed.

        Args:
            name: The function that is called.
            compute: Its result.

        Returns:
            The result, which nobody may write into.

        Raises:
            UnsupportedError: If the tape holds the result of another function at this place.
        """
        if self._reads:
            if self._at == len(self.tape.values) or self.tape.values[self._at][0] != name:
                raise UnsupportedError(
                    f"JacobianOperator: the function calls {name} where it did not in an earlier product at the same "
                    "point: it depends on something else than its input. Build the operator with reuse=False"
                )
            self._at += 1
            return self.tape.values[self._at - 1][1]
        value = compute()
        if not self.tape.too_large:
            self._new.append((name, value))
            self._bytes += value.nbytes
            if self.tape.limit is not None and self._bytes > self.tape.limit:
                self.tape.too_large = True
                self._new.clear()
        return value

    def finish(self) -> None:
        """The run came to its end: what it has computed is the tape."""
        if not self._reads and not self.tape.too_large:
            self.tape.values, self.tape.complete = self._new, True
