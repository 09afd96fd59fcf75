"""Reads PTX text into instructions with resolved register names and source lines."""

from __future__ import annotations

import bisect
import re
from dataclasses import dataclass, field
from typing import Any

from .types import TYPES, Type

__all__ = ["Instruction", "Kernel", "ParseError", "SourceLine", "Variable", "parse", "split_operands"]


class ParseError(ValueError):
    """Text that this reader does not understand."""


@dataclass(frozen=True)
class SourceLine:
    """A line of the kernel's source, and the line that called it where it was inlined."""

    file: str
    line: int
    caller: SourceLine | None = None

    def __str__(self) -> str:
        text = f"{self.file}:{self.line}"
        return f"{text} (inlined at {self.caller})" if self.caller else text


@dataclass(frozen=True)
class Instruction:
    """One instruction: ``@!%p1 ld.global.f32 %f1, [%rd1+4];``."""

    opcode: str
    modifiers: tuple[str, ...]
    operands: tuple[str, ...]
    predicate: str | None
    negated: bool
    line: int
    text: str
    source: SourceLine | None


@dataclass(frozen=True)
class Variable:
    """A variable of a state space (shared, global, const, local) or a kernel parameter."""

    name: str
    type: Type
    count: int
    align: int
    initial: tuple[int, ...] = ()
    dynamic: bool = False  # extern __shared__ T name[]

    @property
    def nbytes(self) -> int:
        return self.type.size * self.count


@dataclass
class Kernel:
    """One ``.entry`` with everything it refers to.

    ``decoded`` is the machine's: what it made of the code, by the addresses of module-scope variables.
    """

    name: str
    target: str
    parameters: list[Variable]
    registers: dict[str, Type] = field(default_factory=dict)
    shared: dict[str, Variable] = field(default_factory=dict)
    local: dict[str, Variable] = field(default_factory=dict)
    global_: dict[str, Variable] = field(default_factory=dict)
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    branch_tables: dict[str, tuple[str, ...]] = field(default_factory=dict)
    required_threads: int | None = None
    decoded: dict[tuple[int, ...], Any] = field(default_factory=dict, init=False, repr=False, compare=False)


def split_operands(text: str) -> tuple[str, ...]:
    """Split at the commas outside brackets: ``{%r1, %r2}, [%rd1+4], 3`` gives three."""
    if not any(bracket in text for bracket in "{[("):
        *parts, last = (part.strip() for part in text.split(","))
        return (*parts, last) if last else tuple(parts)
    parts, depth, start = [], 0, 0
    for position, char in enumerate(text):
        depth += (char in "{[(") - (char in "}])")
        if char == "," and depth == 0:
            parts.append(text[start:position].strip())
            start = position + 1
    last = text[start:].strip()
    return (*parts, last) if last else tuple(parts)


_ENTRY = re.compile(r"\.entry\s+(?P<name>[\w$]+)\s*\((?P<parameters>[^)]*)\)(?P<directives>[^{]*)\{")
_PARAMETER = re.compile(
    r"\.param\s+(?:\.align\s+(?P<align>\d+)\s+)?\.(?P<type>\w+)\s+"
    r"(?:\.ptr\s+(?:\.\w+\s+)?(?:\.align\s+\d+\s+)?)?(?P<name>[\w$]+)(?:\[(?P<count>\d+)\])?"
)
_VARIABLE = re.compile(
    r"\.(?P<space>shared|global|const|local)\s+(?:\.attribute\([^)]*\)\s*)?(?:\.align\s+(?P<align>\d+)\s+)?"
    r"\.(?P<type>\w+)\s+(?P<name>[\w$]+)\s*(?P<array>\[(?P<count>\d*)\])?"
    r"\s*(?:=\s*(?P<initial>\{[^}]*\}|[^;]+))?;"
)
_REGISTERS = re.compile(r"\.reg\s+\.(?P<type>\w+)\s+(?P<names>[^;]*);")
_REGISTER_RANGE = re.compile(r"(?P<prefix>%?[\w$]+)<(?P<count>\d+)>")
_LOC = re.compile(
    r"\.loc\s+(?P<file>\d+)\s+(?P<line>\d+)\s+\d+(?:\s*,\s*function_name\s+[\w$+]+(?:\s*\+\s*\d+)?)?"
    r"(?:\s*,\s*inlined_at\s+(?P<caller_file>\d+)\s+(?P<caller_line>\d+)\s+\d+)?"
)
_LABEL = re.compile(r"([\w$]+)\s*:(?!:)")
_TABLE = re.compile(r"([\w$]+)\s*:\s*\.branchtargets\s+([^;]*);")
_INSTRUCTION = re.compile(r"(?:@(?P<neg>!?)(?P<pred>[%\w$]+)\s+)?(?P<op>[\w.:]+)\s*(?P<rest>.*)$", re.DOTALL)
_NAME = re.compile(r"%?[A-Za-z_$][\w$]*")


def parse(text: str) -> dict[str, Kernel]:
    """Return every kernel of a PTX module by name.

    Raises:
        ParseError: If a statement has a form that is not known.
    """
    text = _blank_comments(text)
    files = {number: path.split("/")[-1] for number, path in re.findall(r'\.file\s+(\d+)\s+"([^"]*)"', text)}
    target = re.search(r"\.target\s+(\w+)", text)
    spans = [(entry, entry.end(), _closing_brace(text, entry.end())) for entry in _ENTRY.finditer(text)]
    outside = _outside(text, spans)
    module_variables = [_variable(match) for match in _VARIABLE.finditer(outside)]
    newlines = [match.start() for match in re.finditer("\n", text)]
    kernels = {}
    for entry, start, end in spans:
        kernel = Kernel(entry["name"], target[1] if target else "?", [])
        kernel.parameters = [_parameter(match) for match in _PARAMETER.finditer(entry["parameters"])]
        required = re.search(r"\.reqntid\s+(\d+)(?:\s*,\s*(\d+))?(?:\s*,\s*(\d+))?", entry["directives"])
        if required:
            kernel.required_threads = int(required[1]) * int(required[2] or 1) * int(required[3] or 1)
        for space, variable in module_variables:
            (kernel.shared if space == "shared" else kernel.global_)[variable.name] = variable
        _BodyReader(kernel, text, start, end, newlines, files).read()
        kernels[kernel.name] = kernel
    return kernels


def _blank_comments(text: str) -> str:
    text = re.sub(r"/\*.*?\*/", lambda match: re.sub(r"[^\n]", " ", match[0]), text, flags=re.DOTALL)
    return re.sub(r"//[^\n]*", "", text)


def _closing_brace(text: str, start: int) -> int:
    depth = 1
    for match in re.compile(r"[{}]").finditer(text, start):
        depth += 1 if match[0] == "{" else -1
        if depth == 0:
            return match.start()
    raise ParseError("a kernel body without its closing brace")


def _outside(text: str, spans: list) -> str:
    pieces, position = [], 0
    for entry, _, end in spans:
        pieces.append(text[position : entry.start()])
        position = end + 1
    rest = text[position:].split(".section", 1)[0]  # debug sections follow the code
    return "".join([*pieces, rest])


def _parameter(match: re.Match[str]) -> Variable:
    kind, count = TYPES[match["type"]], int(match["count"] or 1)
    return Variable(match["name"], kind, count, int(match["align"] or kind.size))


def _bits(text: str, name: str) -> int:
    """Return an initial value as an integer: ``-3``, ``0x1fU``, or the bits of ``0f3FC00000`` and ``0d...``."""
    if re.fullmatch(r"0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}", text):
        return int(text[2:], 16)
    if re.fullmatch(r"-?(?:0[xX][0-9a-fA-F]+|\d+)U?", text):
        return int(text.rstrip("U"), 0)
    raise ParseError(f"the variable {name} begins as {text!r}: numbers are known, addresses and expressions are not")


def _variable(match: re.Match[str]) -> tuple[str, Variable]:
    kind = TYPES[match["type"]]
    dynamic = match["array"] is not None and not match["count"] and not match["initial"]
    initial = tuple(_bits(text, match["name"]) for text in split_operands((match["initial"] or "").strip("{} \n")))
    count = 0 if dynamic else int(match["count"] or max(1, len(initial)))
    align = int(match["align"] or kind.size)
    return match["space"], Variable(match["name"], kind, count, align, initial, dynamic)


class _BodyReader:
    """Walks through the statements of one kernel body, following register scopes and source lines."""

    def __init__(
        self, kernel: Kernel, text: str, start: int, end: int, newlines: list[int], files: dict[str, str]
    ) -> None:
        self.kernel, self.text, self.position, self.end = kernel, text, start, end
        self.newlines, self.files = newlines, files
        self.scopes: list[dict[str, str]] = [{}]  # name in the text to unique name, innermost last
        self.n_scopes = 0
        self.source: SourceLine | None = None

    def read(self) -> None:
        while True:
            while self.position < self.end and self.text[self.position].isspace():
                self.position += 1
            if self.position >= self.end:
                return
            self._statement()

    def _statement(self) -> None:
        char = self.text[self.position]
        if char in "{};":
            if char == "{":
                self.scopes.append({})
                self.n_scopes += 1
            elif char == "}":
                self.scopes.pop()
            self.position += 1
        elif self.text.startswith((".loc ", ".loc\t", ".file"), self.position):  # and not .local
            self._location(self._take_until("\n"))
        elif table := _TABLE.match(self.text, self.position, self.end):
            self.kernel.branch_tables[table[1]] = split_operands(table[2])
            self.position = table.end()
        elif label := _LABEL.match(self.text, self.position, self.end):
            self.kernel.labels[label[1]] = len(self.kernel.code)
            self.position = label.end()
        else:
            line = bisect.bisect_left(self.newlines, self.position) + 1
            statement = self._take_until(";")
            if statement.startswith("."):
                self._directive(statement + ";")
            else:
                self.kernel.code.append(self._instruction(statement, line))

    def _take_until(self, stop: str) -> str:
        end = self.text.find(stop, self.position, self.end)
        end = self.end if end < 0 else end
        piece = self.text[self.position : end]
        self.position = end + 1
        return piece.strip()

    def _location(self, directive: str) -> None:
        match = _LOC.match(directive)
        if match is None or match["line"] == "0":  # line 0: code without a line; the last one is the better answer
            return
        caller = None
        if match["caller_file"]:
            caller = SourceLine(self.files.get(match["caller_file"], "?"), int(match["caller_line"]))
        self.source = SourceLine(self.files.get(match["file"], "?"), int(match["line"]), caller)

    def _directive(self, statement: str) -> None:
        if registers := _REGISTERS.match(statement):
            for item in split_operands(registers["names"]):
                many = _REGISTER_RANGE.fullmatch(item)
                names = [f"{many['prefix']}{i}" for i in range(int(many["count"]))] if many else [item]
                for name in names:
                    unique = name if len(self.scopes) == 1 else f"{name}@{self.n_scopes}"
                    self.scopes[-1][name] = unique
                    self.kernel.registers[unique] = TYPES[registers["type"]]
        elif variable := _VARIABLE.match(statement):
            space, declared = _variable(variable)
            where = {"shared": self.kernel.shared, "local": self.kernel.local}.get(space, self.kernel.global_)
            where[declared.name] = declared
        elif not statement.startswith((".pragma", ".param")):  # .param: of a call, which no opcode is known for
            raise ParseError(f"kernel {self.kernel.name}: unknown directive {statement!r}")

    def _instruction(self, statement: str, line: int) -> Instruction:
        text = " ".join(statement.split())
        match = _INSTRUCTION.match(text)
        if match is None:
            raise ParseError(f"kernel {self.kernel.name}, PTX line {line}: cannot read {text!r}")
        opcode, *modifiers = match["op"].split(".")
        rest = _NAME.sub(lambda name: self._unique(name[0]), match["rest"]) if len(self.scopes) > 1 else match["rest"]
        predicate = self._unique(match["pred"]) if match["pred"] else None
        operands = split_operands(rest)
        return Instruction(opcode, tuple(modifiers), operands, predicate, bool(match["neg"]), line, text, self.source)

    def _unique(self, name: str) -> str:
        for scope in reversed(self.scopes):
            if name in scope:
                return scope[name]
        return name
