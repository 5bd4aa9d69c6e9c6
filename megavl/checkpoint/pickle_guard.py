"""Bounds what a pickle can cost before it is read: time, memory, and the names that it may use.

A few bytes of pickle can take years. Thirty tuples, each made of the previous one twice, have a hash of a billion
steps; one instruction makes a table of 32 GB. So a pickle is first followed without making its objects. Each value
gets a weight, which is what hashing, comparing or printing it costs at most.
"""

from __future__ import annotations

import pickletools
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from megavl.config.errors import CheckpointError, one_line

MAX_BYTES = 64 << 20
"""Largest pickle. `.metadata` of a model with 10,000 shards has 4 MB."""
MAX_STEPS = 12_000_000
"""Instructions; each takes a microsecond or two here, and up to 150 bytes."""
MAX_WEIGHT = 50_000_000
"""Sum of the weights of all values that are made of others."""
MAX_ARGUMENTS = 100_000
"""Weight of the arguments of one call."""
_CHARACTERS = 8
"""Characters of text that weigh as much as one value."""

_ATOMS = {"NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"}
_TEXTS = {"BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "SHORT_BINBYTES", "BINBYTES"}
_EMPTY = {"EMPTY_LIST": "list", "EMPTY_DICT": "dict", "EMPTY_TUPLE": "tuple"}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_ADDS = {"APPEND": ("list", 1), "APPENDS": ("list", None), "SETITEM": ("dict", 2), "SETITEMS": ("dict", None)}
_REBUILD = "_rebuild_tensor_v2"
"""What torch.save makes tensors with."""
GET_MEMBER = ("builtins", "getattr")
"""What Python 3.11.0 to 3.11.3 names for the members of an enum."""
_STORES = {"BINPUT", "LONG_BINPUT", "MEMOIZE"}
_GETS = {"BINGET", "LONG_BINGET"}


@dataclass(frozen=True, kw_only=True)
class Names:
    """What a kind of pickle may name."""

    known: frozenset[tuple[str, str]]
    """Module and name of everything that may be named."""
    called: frozenset[str]
    """Names that may be called with arguments."""
    made: frozenset[str]
    """Names of classes of which empty objects may be made, to get their content later."""
    tuple_state: frozenset[str] = frozenset()
    """Names of classes whose objects get a tuple as content instead of a mapping."""
    enums: frozenset[str] = frozenset()
    """Names of enums. Their members are called by value or, by Python 3.11.0 to 3.11.3, got by name with `getattr`."""


@dataclass(frozen=True, kw_only=True)
class Storage:
    """A block of numbers that a pickle refers to."""

    kind: str
    """Name of the storage class, such as FloatStorage."""
    key: str
    numel: int


@dataclass(frozen=True, kw_only=True)
class TensorView:
    """A tensor that a pickle makes of stored numbers."""

    offset: int
    """First number."""
    sizes: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(slots=True)
class _Value:
    kind: str
    weight: int = 1
    content: Any = None
    """Text, name, number, or the values in a short tuple."""
    fixed: bool = False
    """It was taken from the memo: a change now would not reach the weights of what holds it."""


_ATOM = _Value("atom")


@dataclass(slots=True)
class CheckedPickle:
    """The state of following a pickle, and what was found in it."""

    names: Names
    source: str
    stack: list[_Value] = field(default_factory=list)
    marks: list[int] = field(default_factory=list)
    memo: dict[int, _Value] = field(default_factory=dict)
    spent: int = 0
    storages: list[Storage] = field(default_factory=list)
    """Blocks of numbers that the pickle refers to."""
    views: list[TensorView | None] = field(default_factory=list)
    """Tensors that it makes of them; None for one in another form than torch.save's usual one."""
    end: int = 0
    """Bytes of the pickle."""

    def holds_one_tensor(self) -> bool:
        """Whether the value of the pickle is one tensor."""
        return len(self.views) == len(self.storages) == 1 and self.stack[-1].content == _REBUILD

    def step(self, name: str, argument: Any) -> None:
        """Follow one instruction."""
        if name in _ATOMS:
            self.stack.append(_Value("number", content=argument) if isinstance(argument, int) else _ATOM)
        elif name in _TEXTS:
            self.stack.append(_Value("text", 1 + len(argument) // _CHARACTERS, argument))
        elif name in _GETS:
            value = self.memo[argument]
            value.fixed = True
            self.stack.append(value)
        elif name in _STORES:
            self.memo[self._free_index(name, argument)] = self.stack[-1]
        elif name == "MARK":
            self.marks.append(len(self.stack))
        elif name in _EMPTY:
            self.stack.append(_Value(_EMPTY[name], content=()))
        elif name == "TUPLE" or name in _TUPLES:
            self._make("tuple", self._take(_TUPLES.get(name)))
        elif name in _ADDS:
            kind, count = _ADDS[name]
            self._add(self._take(count), kind)
        else:
            self._step_with_names(name, argument)

    def _step_with_names(self, name: str, argument: Any) -> None:
        if name == "GLOBAL":
            self._name(*argument.split(" ", 1))
        elif name == "STACK_GLOBAL":
            module, attribute = self._take(2)
            self._name(str(module.content), str(attribute.content))
        elif name == "REDUCE":
            function, arguments = self._take(2)
            self._call(function, arguments, self.names.called)
        elif name == "NEWOBJ":
            function, arguments = self._take(2)
            self._call(function, arguments, self.names.made)
        elif name == "BUILD":
            (state,) = self._take(1)
            target = self.stack[-1]
            wanted = "tuple" if target.content in self.names.tuple_state else "dict"
            if target.kind != "object" or state.kind != wanted:
                raise CheckpointError(f"{self.source}: refused, it changes a {target.kind} with a {state.kind}")
            self._add([state], "object")
        elif name == "BINPERSID":
            self._persistent(*self._take(1))
        elif name not in ("PROTO", "FRAME", "STOP"):
            raise CheckpointError(f"{self.source}: refused instruction {name} of the pickle; do not trust this file")

    def _take(self, count: int | None) -> list[_Value]:
        """Take values from the stack: `count`, or down to the last mark."""
        start = self.marks.pop() if count is None else len(self.stack) - count
        if start < (self.marks[-1] if self.marks else 0):
            raise IndexError("the stack is empty")
        taken = self.stack[start:]
        del self.stack[start:]
        return taken

    def _make(self, kind: str, parts: list[_Value], content: Any = None) -> None:
        weight = 1 + sum(part.weight for part in parts)
        self._spend(weight)
        self.stack.append(_Value(kind, weight, parts if content is None and len(parts) < 8 else content))

    def _add(self, parts: list[_Value], kind: str) -> None:
        target = self.stack[-1]
        # An OrderedDict is made by a call.
        if target.kind not in (kind, "object") or target.fixed:
            raise CheckpointError(f"{self.source}: refused, it adds to a {target.kind} that is in use already")
        added = sum(part.weight for part in parts)
        target.weight += added
        self._spend(added)

    def _name(self, module: str, name: str) -> None:
        if (module, name) not in self.names.known:
            raise CheckpointError(
                f"refused global {module[:100]}.{name[:100]} in {self.source}; do not trust this file"
            )
        self.stack.append(_Value("name", content=name))

    def _call(self, function: _Value, arguments: _Value, allowed: frozenset[str]) -> None:
        if function.kind != "name" or function.content not in allowed or arguments.kind != "tuple":
            name = function.content if function.kind == "name" else f"a {function.kind}"
            raise CheckpointError(f"{self.source}: refused, it calls {name}; do not trust this file")
        if arguments.weight > MAX_ARGUMENTS:
            raise CheckpointError(f"{self.source}: refused, it calls {function.content} with too much")
        if function.content == _REBUILD:
            self.views.append(_view(arguments.content))
        if function.content == GET_MEMBER[1]:
            self._require_member(arguments)
        is_member = function.content in {*self.names.enums, GET_MEMBER[1]}
        self._make("member" if is_member else "object", [arguments], content=function.content)

    def _require_member(self, arguments: _Value) -> None:
        match [(part.kind, part.content) for part in arguments.content or ()]:
            case [("name", str(enum)), ("text", str())] if enum in self.names.enums:
                return
        raise CheckpointError(f"{self.source}: refused, it gets an attribute of no enum; do not trust this file")

    def _persistent(self, reference: _Value) -> None:
        parts: list[_Value] = list(reference.content or ()) if reference.kind == "tuple" else []
        found = [part.content for part in parts]
        match found:
            case ["storage", str(kind), str(key), str(), int(numel)] if numel >= 0 and parts[1].kind == "name":
                self.storages.append(Storage(kind=kind, key=key, numel=numel))
            case _:
                raise CheckpointError(f"{self.source}: refused, it refers to something else than stored numbers")
        self.stack.append(_Value("storage"))

    def _free_index(self, name: str, argument: Any) -> int:
        index = len(self.memo) if name == "MEMOIZE" else int(argument)
        # The reader's table is as long as the largest index.
        if index > 2 * len(self.memo) + 1000:
            raise CheckpointError(f"{self.source}: refused, index {index} of the memo; do not trust this file")
        return index

    def _spend(self, weight: int) -> None:
        self.spent += weight
        if self.spent > MAX_WEIGHT:
            raise CheckpointError(f"{self.source}: refused, its values contain each other too often to be read")


def _view(arguments: Any) -> TensorView | None:
    """Offset, sizes and strides among the arguments that a tensor is made with."""
    values = [argument.content for argument in arguments or ()]
    match values:
        case [_, int(offset), list() | tuple() as sizes, list() | tuple() as strides, *_]:
            numbers = [[part.content for part in parts] for parts in (sizes, strides)]
            if all(isinstance(number, int) for part in numbers for number in part):
                return TensorView(offset=offset, sizes=tuple(numbers[0]), strides=tuple(numbers[1]))
    return None


def check_pickle(raw: bytes, *, names: Names, source: str) -> CheckedPickle:
    """Follow a pickle to its end; bytes after it are ignored.

    Raises:
        CheckpointError: "refused global MODULE.NAME in SOURCE", an instruction that the format does not need, or too
            much work. Or the bytes are no pickle.
    """
    if len(raw) > MAX_BYTES:
        raise CheckpointError(f"{source}: a pickle of {len(raw):,} bytes, at most {MAX_BYTES:,} are read")
    reading = CheckedPickle(names, source)
    try:
        for number, (instruction, argument, position) in enumerate(pickletools.genops(raw)):
            if number > MAX_STEPS:
                raise CheckpointError(f"{source}: a pickle of more than {MAX_STEPS:,} instructions")
            reading.step(instruction.name, argument)
            reading.end = (position or 0) + 1
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle raises nearly anything
        raise CheckpointError(f"{source}: not readable ({type(error).__name__}: {one_line(error)})") from error
    return reading


def names_of(modules: Iterable[tuple[str, Iterable[str]]]) -> frozenset[tuple[str, str]]:
    """Pairs of module and name."""
    return frozenset((module, name) for module, names in modules for name in names)
