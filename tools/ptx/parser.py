"""Parse PTX text into kernels: variables with their places, and instructions whose names are resolved.

The parser follows the sections "Syntax", "State Spaces, Types, and Variables", "Instruction Operands" and "Directives"
of the PTX ISA. It knows only the syntax; interpreter/ knows the meaning of opcodes and modifiers. Text that neither
knows is an error. A kernel is parsed at its first use.
"""

from __future__ import annotations

import functools
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

# The spaces begin at these addresses, as in interpreter/memory.h.
SHARED_START, LOCAL_START, PARAM_START, BUFFER_SHIFT, BUFFER_OFFSET = 1024, 64, 64, 36, 0x1000

TYPE_BYTES = {
    **{f"{letter}{8 * size}": size for letter in "bus" for size in (1, 2, 4, 8)},
    **{"f16": 2, "bf16": 2, "f16x2": 4, "bf16x2": 4, "f32": 4, "f64": 8, "b128": 16, "pred": 0},
}


class PtxError(Exception):
    """An error for PTX that this interpreter does not know, and for text that is not PTX."""


class Token(NamedTuple):
    text: str
    line: int


@dataclass(frozen=True)
class Variable:
    """A variable of the shared, local, param, global or const space. `size` is None for an extern array."""

    name: str
    space: str
    type: str
    align: int
    size: int | None
    initial: bytes | None = None


@dataclass(frozen=True)
class Register:
    index: int
    negated: bool = False


@dataclass(frozen=True)
class Immediate:
    value: int


@dataclass(frozen=True)
class Float:
    """A literal with its number of bits: 32 for 0f..., 64 for 0d... and decimals."""

    bits: int
    width: int


@dataclass(frozen=True)
class Name:
    """A label, or the address of a variable."""

    text: str
    offset: int = 0


@dataclass(frozen=True)
class Address:
    base: Register | Name | None
    offset: int


@dataclass(frozen=True)
class Vector:
    elements: tuple[Operand, ...]


@dataclass(frozen=True)
class Sink:
    """The destination `_`."""


@dataclass(frozen=True)
class TensorAddress:
    """A tensor map's address with coordinates: `[map, {x, y}]`."""

    address: Address
    coordinates: Vector


Operand = Register | Immediate | Float | Name | Address | Vector | Sink | TensorAddress


@dataclass
class Instruction:
    opcode: str
    operands: list[Operand]
    guard: Register | None
    line: int
    source: tuple[tuple[int, int], ...]  # (file, line) of the instruction, then of the place that it is inlined at
    scope: int


@dataclass
class Kernel:
    name: str
    params: list[Variable] = field(default_factory=list)
    registers: list[int] = field(default_factory=list)  # the bits of each register
    specials: dict[str, int] = field(default_factory=dict)
    variables: dict[str, Variable] = field(default_factory=dict)
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[tuple[int, str], int] = field(default_factory=dict)
    targets: dict[tuple[int, str], list[str]] = field(default_factory=dict)
    parents: list[int] = field(default_factory=lambda: [-1])  # the parent of each scope
    cluster: tuple[int, ...] = ()  # .reqnctapercluster
    max_registers: int = 0  # .maxnreg; 0 if it is not given

    def find(self, table: dict[tuple[int, str], object], scope: int, name: str) -> object | None:
        """Find a name in a scope or one that encloses it; return None if there is none."""
        while scope >= 0:
            if (scope, name) in table:
                return table[scope, name]
            scope = self.parents[scope]
        return None


class Kernels(Mapping[str, Kernel]):
    """The kernels of a module by name, each parsed at its first use."""

    def __init__(self, texts: dict[str, tuple[str, int]]) -> None:
        self.texts = texts

    def __getitem__(self, name: str) -> Kernel:
        return _kernel(*self.texts[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.texts)

    def __len__(self) -> int:
        return len(self.texts)


@dataclass
class Ptx:
    target: str = ""
    kernels: Mapping[str, Kernel] = field(default_factory=dict)
    variables: dict[str, Variable] = field(default_factory=dict)
    files: dict[int, str] = field(default_factory=dict)


_TOKEN = re.compile(
    r"""(?P<skip>[ \t\r]+|//[^\n]*|/\*.*?\*/)
      | (?P<newline>\n)
      | (?P<string>"(?:[^"\\]|\\.)*")
      | (?P<number>0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}|0[xX][0-9a-fA-F]+U?|0[bB][01]+U?
                   |\d+\.\d*(?:[eE][+-]?\d+)?|\d+[eE][+-]?\d+|\d+U?)
      | (?P<name>[.%$_A-Za-z][\w$%]*(?:(?:\.|::)[\w$]+)*)
      | (?P<sign>[{}()\[\],;:@!|+\-=<>*])""",
    re.VERBOSE | re.DOTALL,
)


def tokens(text: str, line: int = 1) -> Iterator[Token]:
    at = 0
    while at < len(text):
        match = _TOKEN.match(text, at)
        if not match:
            raise PtxError(f"line {line}: {text[at : at + 20]!r} is not understood")
        if match.lastgroup not in ("skip", "newline"):
            yield Token(match[0], line)
        line += match[0].count("\n")
        at = match.end()


def integer(text: str) -> int:
    """Return the value of an integer literal; octal ones begin with 0 in PTX."""
    text = text.rstrip("U")
    return int(text, 8) if re.fullmatch(r"0[0-7]+", text) else int(text, 0)


class Parser:
    def __init__(self, text: str, line: int = 1) -> None:
        self.tokens = list(tokens(text, line))
        self.at = 0
        self.ptx = Ptx()

    # ---- Tokens
    def error(self, what: str) -> PtxError:
        line = self.tokens[min(self.at, len(self.tokens) - 1)].line if self.tokens else 0
        return PtxError(f"PTX line {line}: {what}")

    @property
    def next(self) -> str:
        return self.tokens[self.at].text if self.at < len(self.tokens) else ""

    def take(self, text: str | None = None) -> str:
        if self.at >= len(self.tokens) or (text is not None and self.next != text):
            raise self.error(f"{text or 'more'} was expected, not {self.next!r}")
        self.at += 1
        return self.tokens[self.at - 1].text

    def accept(self, text: str) -> bool:
        if self.next == text:
            self.at += 1
            return True
        return False

    def rest_of_line(self) -> list[str]:
        line, words = self.tokens[self.at - 1].line, []
        while self.at < len(self.tokens) and self.tokens[self.at].line == line:
            words.append(self.take())
        return words

    def number(self) -> int:
        sign = -1 if self.accept("-") else 1
        return sign * integer(self.take())

    # ---- Module
    def parse(self) -> Ptx:
        while self.next:
            word = self.take()
            if word == ".version":
                self.rest_of_line()
            elif word == ".target":
                self.ptx.target = self.rest_of_line()[0]
            elif word == ".address_size":
                if self.number() != 64:
                    raise self.error("addresses are of 64 bits here")
            elif word == ".file":
                words = self.rest_of_line()
                self.ptx.files[int(words[0])] = words[1].strip('"')
            elif word == ".section":
                while self.take() != "{":
                    pass
                while self.take() != "}":
                    pass
            elif word in (".visible", ".weak", ".extern", ".common"):
                pass
            elif word == ".func":
                self.function()
            elif word in (".global", ".const", ".shared"):
                for variable in self.variable(word[1:]):
                    self.ptx.variables[variable.name] = variable
            elif word == ".pragma":
                self.skip_statement()
            else:
                raise self.error(f"the directive {word!r} is not known")
        return self.ptx

    def skip_statement(self) -> None:
        while self.take() != ";":
            pass

    def function(self) -> None:
        """Skip a declaration of a function; a body, which only a call would reach, is an error."""
        name = ""
        while self.next not in (";", "{"):
            word = self.take()
            if re.match(r"[A-Za-z_$]", word):
                name = name or word
        if self.next == "{":
            raise self.error(f".func {name}: functions that are not inlined are not emulated")
        self.take(";")

    def variable(self, space: str) -> list[Variable]:
        """Parse the rest of a declaration after `.shared` or another space: `.align 16 .b8 a[64] = {...}, b[4];`."""
        align = 0
        kind = ""
        while self.next.startswith("."):
            word = self.take()
            if word == ".align":
                align = self.number()
            elif word in (".v2", ".v4"):
                raise self.error("vector variables are not known")
            elif word in (".ptr", ".global", ".const", ".local", ".shared"):
                pass  # `.param .u64 .ptr .global .align 16 name` describes the memory that the pointer points to
            elif word == ".attribute":
                raise self.error(".attribute is not known")
            elif word[1:] in TYPE_BYTES:
                kind = word[1:]
            else:
                raise self.error(f"{word!r} is not known in a variable's declaration")
        if not kind:
            raise self.error("the variable has no type")
        found = []
        while True:
            name = self.take()
            count: int | None = 1
            while self.accept("["):
                if self.accept("]"):
                    count = None
                else:
                    count = (count or 1) * self.number()
                    self.take("]")
            size = None if count is None else count * TYPE_BYTES[kind]
            initial = self.initializer(kind, size) if self.accept("=") else None
            # The .align of a pointer parameter is that of its target; the parameter itself is aligned as its type.
            own = max(align, TYPE_BYTES[kind]) if kind == "b8" or space != "param" else TYPE_BYTES[kind]
            found.append(Variable(name, space, kind, own or 1, size, initial))
            if not self.accept(","):
                break
            if space == "param":
                self.at -= 1
                break
        if space != "param":
            self.take(";")
        return found

    def initializer(self, kind: str, size: int | None) -> bytes:
        words: list[str] = []
        depth = 0
        while True:
            word = self.take()
            depth += (word == "{") - (word == "}")
            if word not in "{},":
                words.append("-" + self.take() if word == "-" else word)
            if depth == 0 and self.next in (";", ","):
                break
        data = b""
        for word in words:
            if kind in ("f32", "f64") or word[:2].lower() in ("0f", "0d"):
                data += self.literal_bits(word).to_bytes(TYPE_BYTES[kind], "little")
            elif re.match(r"-?\d", word):
                data += (integer(word) & (1 << 8 * TYPE_BYTES[kind]) - 1).to_bytes(TYPE_BYTES[kind], "little")
            else:
                raise self.error(f"the initializer {word!r} is not known")
        return data.ljust(size or len(data), b"\0")

    @staticmethod
    def literal_bits(word: str) -> int:
        if word[:2] in ("0f", "0F", "0d", "0D"):
            return int(word[2:], 16)
        return struct.unpack("<Q", struct.pack("<d", float(word)))[0]

    # ---- Kernels
    def kernel(self) -> Kernel:
        self.take(".entry")
        kernel = Kernel(self.take())
        if self.accept("("):
            while not self.accept(")"):
                self.take(".param")
                kernel.params += self.variable("param")
                self.accept(",")
        while self.next != "{":
            word = self.take()
            known = (".maxntid", ".reqntid", ".minnctapersm", ".maxnreg", ".maxnctapersm", ".pragma", ";")
            if word not in (*known, ".reqnctapercluster", ".maxclusterrank", ".explicitcluster"):
                raise self.error(f"the directive {word!r} is not known here")
            if word == ".pragma":
                self.take()
            elif word not in (";", ".explicitcluster"):
                numbers = [self.number()]
                while self.accept(","):
                    numbers.append(self.number())
                if word == ".reqnctapercluster":
                    kernel.cluster = tuple(numbers)
                elif word == ".maxnreg":
                    kernel.max_registers = numbers[0]
        self.take("{")
        _Body(self, kernel).parse()
        return kernel


class _Body:
    """A parser of the statements between a kernel's braces; inner braces open a scope for registers and labels."""

    def __init__(self, parser: Parser, kernel: Kernel) -> None:
        self.p = parser
        self.kernel = kernel
        self.scope = 0
        self.names: list[dict[str, int]] = [{}]  # the registers of each open scope, innermost last
        self.source: tuple[tuple[int, int], ...] = ()

    def parse(self) -> None:
        p, kernel = self.p, self.kernel
        depth = [0]
        while True:
            word = p.take()
            if word == "{":
                kernel.parents.append(self.scope)
                self.scope = len(kernel.parents) - 1
                depth.append(self.scope)
                self.names.append({})
            elif word == "}":
                depth.pop()
                self.names.pop()
                if not depth:
                    return
                self.scope = depth[-1]
            elif word == ".reg":
                self.registers()
            elif word in (".shared", ".local", ".const", ".global"):
                for variable in p.variable(word[1:]):
                    kernel.variables[variable.name] = variable
            elif word == ".loc":
                self.location(p.rest_of_line())
            elif word == ".pragma":
                p.skip_statement()
            elif word.startswith("."):
                raise p.error(f"the directive {word!r} is not known in a kernel")
            elif word == ";":
                pass
            elif p.next == ":" and word[0] != "@":
                p.take(":")
                if p.next in (".branchtargets", ".calltargets", ".callprototype"):
                    if p.take() != ".branchtargets":
                        raise p.error("calls are not emulated")
                    targets = []
                    while not p.accept(";"):
                        targets.append(p.take())
                        p.accept(",")
                    kernel.targets[self.scope, word] = targets
                else:
                    kernel.labels[self.scope, word] = len(kernel.instructions)
            else:
                self.instruction(word)

    def location(self, words: list[str]) -> None:
        """Parse `.loc file line column [, function_name label, inlined_at file line column]`; line 0 is ignored."""
        places = [(int(words[0]), int(words[1]))]
        if "inlined_at" in words:
            at = words.index("inlined_at")
            places.append((int(words[at + 1]), int(words[at + 2])))
        if places[0][1]:
            self.source = tuple(places)

    def registers(self) -> None:
        p = self.p
        kind = p.take()[1:]
        if kind not in TYPE_BYTES or kind == "b128":
            raise p.error(f"registers of type .{kind} are not known")
        bits = 1 if kind == "pred" else 8 * TYPE_BYTES[kind]
        while True:
            name = p.take()
            if p.accept("<"):
                for k in range(p.number()):
                    self.names[-1][f"{name}{k}"] = self.new(bits)
                p.take(">")
            else:
                self.names[-1][name] = self.new(bits)
            if not p.accept(","):
                break
        p.take(";")

    def new(self, bits: int) -> int:
        self.kernel.registers.append(bits)
        return len(self.kernel.registers) - 1

    def register(self, name: str) -> Register | None:
        for names in reversed(self.names):
            if name in names:
                return Register(names[name])
        if name.startswith("%"):
            if name not in self.kernel.specials:
                self.kernel.specials[name] = self.new(64 if name in ("%gridid", "%clock64", "%globaltimer") else 32)
            return Register(self.kernel.specials[name])
        return None

    def instruction(self, word: str) -> None:
        p = self.p
        line = p.tokens[p.at - 1].line
        guard = None
        if word == "@":
            negated = p.accept("!")
            register = self.register(p.take())
            if register is None:
                raise p.error("the guard is not a register")
            guard = Register(register.index, negated)
            word = p.take()
        operands: list[Operand] = []
        if word.split(".")[0] == "call":
            raise p.error("call: functions that are not inlined are not emulated")
        while not p.accept(";"):
            operands.append(self.operand())
            if p.accept("|"):  # two destinations: p|q, d|p
                operands[-1] = Vector((operands[-1], self.operand()))
            if p.next != ";":
                p.take(",")
        self.kernel.instructions.append(Instruction(word, operands, guard, line, self.source, self.scope))

    def operand(self) -> Operand:
        p = self.p
        if p.accept("{"):
            elements = []
            while not p.accept("}"):
                elements.append(self.operand())
                p.accept(",")
            return Vector(tuple(elements))
        if p.accept("["):
            base = self.operand()
            offset = 0
            while p.next in "+-":
                offset += p.number() if p.next == "-" else (p.take("+") and p.number())
            coordinates = self.operand() if p.accept(",") else None
            p.take("]")
            if isinstance(base, Immediate):
                address = Address(None, base.value + offset)
            elif isinstance(base, Name):
                address = Address(Name(base.text), base.offset + offset)
            elif isinstance(base, Register):
                address = Address(base, offset)
            else:
                raise p.error("the address is not understood")
            if coordinates is None:
                return address
            if not isinstance(coordinates, Vector):
                raise p.error("the coordinates are no vector")
            return TensorAddress(address, coordinates)
        negated = p.accept("!")
        if p.next == "-" or p.next[0].isdigit():
            sign = "-" if p.accept("-") else ""
            word = p.take()
            if word[:2] in ("0f", "0F"):
                return Float(int(word[2:], 16) ^ (1 << 31 if sign else 0), 32)
            if word[:2] in ("0d", "0D") or (re.search(r"[.eE]", word) and not word.startswith(("0x", "0X"))):
                return Float(p.literal_bits(word) ^ (1 << 63 if sign else 0), 64)
            return Immediate(integer(word) * (-1 if sign else 1))
        word = p.take()
        if word == "_":
            return Sink()
        if word == "WARP_SZ":
            return Immediate(32)
        register = self.register(word)
        if register is not None:
            return Register(register.index, negated)
        offset = 0
        while p.next in ("+", "-") and p.next:
            offset += p.number() if p.next == "-" else (p.take("+") and p.number())
        return Name(word, offset)


# These are comments and strings, in which a brace does not count, braces, and the beginning of a kernel.
_OUTLINE = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:[^"\\]|\\.)*"|[{}]|\.entry\s+([\w$]+)', re.DOTALL)


@functools.lru_cache(maxsize=256)
def _kernel(text: str, line: int) -> Kernel:
    return Parser(text, line).kernel()


def parse(text: str) -> Ptx:
    """Parse a module, except the texts of its kernels, which are found by their braces and parsed later."""
    texts: dict[str, tuple[str, int]] = {}
    rest, kept, start, name, depth = "", 0, 0, "", 0
    for match in _OUTLINE.finditer(text):
        if match[1]:
            start, name, depth = match.start(), match[1], 0
        elif name and match[0] in "{}":
            depth += 1 if match[0] == "{" else -1
            if depth == 0:
                body = text[start : match.end()]
                texts[name] = (body, text.count("\n", 0, start) + 1)
                rest += text[kept:start] + "\n" * body.count("\n")
                kept, name = match.end(), ""
    if name:
        raise PtxError(f"the kernel '{name}' has no end")
    ptx = Parser(rest + text[kept:]).parse()
    ptx.kernels = Kernels(texts)
    return ptx
