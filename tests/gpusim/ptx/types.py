"""PTX types, and the numpy types that carry them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["TYPES", "UNSIGNED", "Type", "type_of"]

UNSIGNED = {1: np.dtype(np.uint8), 2: np.dtype(np.uint16), 4: np.dtype(np.uint32), 8: np.dtype(np.uint64)}


@dataclass(frozen=True)
class Type:
    """One PTX type.

    Attributes:
        name: ``u32``, ``f16x2``, ...
        size: Bytes.
        kind: ``u`` unsigned, ``s`` signed, ``b`` bits, ``f`` IEEE float that numpy has, ``h`` a 16-bit float format
            or a pair of them that is computed in float32 and rounded, ``p`` predicate.
        dtype: Numpy type of a value in an instruction of this type.
    """

    name: str
    size: int
    kind: str
    dtype: np.dtype

    @property
    def bits(self) -> int:
        return 8 * self.size

    @property
    def raw(self) -> np.dtype:
        """The unsigned integer that holds the bits in a register."""
        return np.dtype(bool) if self.kind == "p" else UNSIGNED[self.size]

    @property
    def is_float(self) -> bool:
        return self.kind in "fh"

    @property
    def wide(self) -> Type:
        """The integer type of twice the width: ``u16`` gives ``u32``."""
        return TYPES[f"{self.name[0]}{2 * self.bits}"]


def _all_types() -> dict[str, Type]:
    found = [Type("pred", 1, "p", np.dtype(bool))]
    for size in (1, 2, 4, 8):
        found.append(Type(f"b{8 * size}", size, "b", UNSIGNED[size]))
        found.append(Type(f"u{8 * size}", size, "u", UNSIGNED[size]))
        found.append(Type(f"s{8 * size}", size, "s", np.dtype(f"i{size}")))
    found.append(Type("f32", 4, "f", np.dtype(np.float32)))
    found.append(Type("f64", 8, "f", np.dtype(np.float64)))
    found.append(Type("tf32", 4, "b", UNSIGNED[4]))
    for name, size in (("f16", 2), ("bf16", 2), ("f16x2", 4), ("bf16x2", 4)):
        found.append(Type(name, size, "h", UNSIGNED[size]))
    return {kind.name: kind for kind in found}


TYPES = _all_types()


def type_of(modifiers: tuple[str, ...]) -> Type:
    """Return the type an instruction ends with: the last of its modifiers that names one."""
    for modifier in reversed(modifiers):
        if modifier in TYPES:
            return TYPES[modifier]
    raise KeyError(f"no type among {modifiers}")
