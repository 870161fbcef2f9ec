"""Values between two processes that do not trust each other: plain data by value, all else as a handle.

A message is one JSON text with its length before it. Scalars are themselves; everything else is a list whose
first item is a tag:

    ["list", key, items] ...   mutable containers; `key` numbers them so that ["@", key] can mean the same object
    ["tuple", items] ...       immutable ones
    ["handle", id, name]       an object of the sender: the receiver only gets a stand-in
    ["yours", id]              an object of the receiver, which had been handed out as a handle

Only exact built-in types are rebuilt, so no code of the sender runs in the receiver, and an instance of a
subclass (with whatever __eq__) arrives as the built-in value that it holds.
"""

import base64
import builtins
import collections
import datetime
import decimal
import fractions
import functools
import json
import os
import struct
import sys
from collections.abc import Callable, Iterable
from typing import Any

MAX_FRAME = 32 << 20
_EXACT = 1 << 53

# Containers by tag, most specific type first; dict-like ones travel as pairs.
_SEQUENCES: dict[str, Any] = {"list": list, "set": set, "deque": collections.deque}
_MAPPINGS: dict[str, type] = {
    "counter": collections.Counter,
    "defaultdict": collections.defaultdict,
    "ordered": collections.OrderedDict,
    "dict": dict,
}
_MOMENTS: dict[str, type] = {"datetime": datetime.datetime, "date": datetime.date, "time": datetime.time}

# Built-in classes are the same on both sides, so `f(x) is int` and isinstance() work.
_TYPES: dict[str, type] = {
    kind.__name__: kind
    for kind in vars(builtins).values()
    if isinstance(kind, type) and kind not in (type, object, super, property, classmethod, staticmethod, memoryview)
}


@functools.lru_cache(maxsize=256)
def _namedtuple(name: str, fields: tuple[str, ...]) -> Any:
    return collections.namedtuple(name, fields)


class WireError(Exception):
    """The other side sent something that is no message."""


class Closed(Exception):
    """The other side is gone."""


class Pipe:
    """Messages over two descriptors."""

    def __init__(self, read_fd: int, write_fd: int) -> None:
        self._read_fd, self._write_fd = read_fd, write_fd

    def send(self, message: list[Any]) -> None:
        data = json.dumps(message).encode("ascii")
        if len(data) > MAX_FRAME:
            raise WireError(f"a value of {len(data)} encoded bytes is too large")
        view = memoryview(struct.pack("<I", len(data)) + data)
        try:
            while view:
                view = view[os.write(self._write_fd, view) :]
        except OSError:
            raise Closed from None

    def receive(self) -> list[Any]:
        (size,) = struct.unpack("<I", self._exactly(4))
        if size > MAX_FRAME:
            raise WireError(f"a message of {size} bytes is too large")
        try:
            message = json.loads(self._exactly(size))
        except (ValueError, RecursionError):
            raise WireError("not a message") from None
        if not isinstance(message, list):
            raise WireError("not a message")
        return message

    def _exactly(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            chunk = os.read(self._read_fd, min(size - len(data), 1 << 20))
            if not chunk:
                raise Closed
            data += chunk
        return bytes(data)


class Encoder:
    """Encodes the values of one message. `known`: containers that the other side has already, by their keys."""

    def __init__(self, export: Callable[[Any], list[Any]], known: dict[int, Any] | None = None) -> None:
        self._export = export
        self.containers: dict[int, Any] = dict(known or {})  # also keeps them alive, so that ids stay theirs
        self._keys = {id(value): key for key, value in self.containers.items()}

    def encode(self, value: Any) -> Any:
        if value is None or value is True or value is False:
            return value
        kind = type(value)
        if kind is str or kind is float:
            return value
        if isinstance(value, int):
            number = int(value)
            return number if -_EXACT < number < _EXACT else ["int", hex(number)]
        if isinstance(value, str):
            return str.__str__(value)
        if isinstance(value, float):
            return float(value)
        if isinstance(value, (list, set, collections.deque, dict, bytearray)):
            return self._container(value)
        if isinstance(value, tuple):
            return self._tuple(value)
        return self._other(value)

    def contents(self, value: Any) -> list[Any]:
        """The tag and the inside of a mutable container, without its identity."""
        if isinstance(value, bytearray):
            return ["bytearray", base64.b64encode(value).decode("ascii")]
        if isinstance(value, dict):
            tag = next(tag for tag, kind in _MAPPINGS.items() if isinstance(value, kind))
            return [tag, [[self.encode(key), self.encode(item)] for key, item in dict.items(value)]]
        if isinstance(value, collections.deque):
            return ["deque", [self.encode(item) for item in collections.deque.__iter__(value)], value.maxlen]
        for tag in ("list", "set"):
            if isinstance(value, _SEQUENCES[tag]):
                return [tag, [self.encode(item) for item in _SEQUENCES[tag].__iter__(value)]]
        raise WireError(f"not a container: {type(value).__name__}")

    def _container(self, value: Any) -> list[Any]:
        if id(value) in self._keys:
            return ["@", self._keys[id(value)]]
        key = len(self.containers)
        self.containers[key] = value
        self._keys[id(value)] = key
        tag, *inside = self.contents(value)
        return [tag, key, *inside]

    def _tuple(self, value: tuple[Any, ...]) -> list[Any]:
        items = [self.encode(item) for item in tuple.__iter__(value)]
        fields = getattr(type(value), "_fields", None)
        if isinstance(fields, tuple) and len(fields) == len(items):
            return ["namedtuple", type(value).__name__, list(fields), items]
        return ["tuple", items]

    def _other(self, value: Any) -> list[Any]:
        if isinstance(value, bytes):
            return ["bytes", base64.b64encode(value).decode("ascii")]
        if isinstance(value, complex):
            return ["complex", value.real, value.imag]
        if isinstance(value, frozenset):
            return ["frozenset", [self.encode(item) for item in frozenset.__iter__(value)]]
        if isinstance(value, range):
            return ["range", *map(self.encode, (value.start, value.stop, value.step))]
        if isinstance(value, decimal.Decimal):
            return ["decimal", str(value)]
        if isinstance(value, fractions.Fraction):
            return ["fraction", self.encode(value.numerator), self.encode(value.denominator)]
        if isinstance(value, datetime.timedelta):
            return ["timedelta", value.days, value.seconds, value.microseconds]
        for tag, kind in _MOMENTS.items():
            if isinstance(value, kind):
                return [tag, kind.isoformat(value)]  # type: ignore[attr-defined]
        if type(value) is type and _TYPES.get(value.__name__) is value:
            return ["type", value.__name__]
        return _encode_array(value) or self._export(value)


class Decoder:
    """Decodes the values of one message. `known`: as for Encoder; `resolve` turns handle tags into objects."""

    def __init__(self, resolve: Callable[[list[Any]], Any], known: dict[int, Any] | None = None) -> None:
        self._resolve = resolve
        self.containers: dict[int, Any] = dict(known or {})

    def decode(self, value: Any) -> Any:
        if not isinstance(value, list):
            if isinstance(value, dict):
                raise WireError("no such value")
            return value
        try:
            return self._tagged(value)
        except (WireError, Closed):
            raise
        except RecursionError:
            raise WireError("nested too deeply") from None
        except Exception as error:
            raise WireError(f"no such value ({type(error).__name__})") from None

    def restore(self, value: Any, contents: list[Any]) -> None:
        """Give a container that we have the contents that the other side left in its copy."""
        tag, inside = contents[0], contents[1]
        if tag == "bytearray" and isinstance(value, bytearray):
            value[:] = base64.b64decode(inside)
        elif tag in _MAPPINGS and isinstance(value, dict):
            self._fill_mapping(value, inside)
        elif tag in _SEQUENCES and isinstance(value, _SEQUENCES[tag]):
            self._fill_sequence(value, inside)
        else:
            raise WireError("a container of another type")

    def _fill_sequence(self, value: Any, items: list[Any]) -> None:
        decoded = [self.decode(item) for item in items]
        value.clear()
        (value.update if isinstance(value, set) else value.extend)(decoded)

    def _fill_mapping(self, value: dict[Any, Any], pairs: list[Any]) -> None:
        decoded = [(self.decode(key), self.decode(item)) for key, item in pairs]
        dict.clear(value)
        for key, item in decoded:
            dict.__setitem__(value, key, item)

    def _tagged(self, value: list[Any]) -> Any:
        tag, *rest = value
        if tag == "@":
            return self.containers[rest[0]]
        if tag == "bytearray":
            return self._keep(rest[0], bytearray(base64.b64decode(rest[1])))
        if tag in _SEQUENCES:
            made = collections.deque(maxlen=rest[2]) if tag == "deque" else _SEQUENCES[tag]()
            self._fill_sequence(self._keep(rest[0], made), rest[1])
            return made
        if tag in _MAPPINGS:
            mapping = _MAPPINGS[tag]()
            self._fill_mapping(self._keep(rest[0], mapping), rest[1])
            return mapping
        if tag in ("handle", "yours"):
            return self._resolve(value)
        return self._immutable(tag, rest)

    def _keep(self, key: Any, value: Any) -> Any:
        if not isinstance(key, int) or key in self.containers:
            raise WireError("a container numbered twice")
        self.containers[key] = value
        return value

    def _immutable(self, tag: Any, rest: list[Any]) -> Any:
        if tag == "int":
            return int(rest[0], 16)
        if tag == "tuple":
            return tuple(self._all(rest[0]))
        if tag == "namedtuple":
            name, fields, items = rest
            return _namedtuple(name, tuple(fields))(*self._all(items))
        if tag == "frozenset":
            return frozenset(self._all(rest[0]))
        if tag == "bytes":
            return base64.b64decode(rest[0])
        if tag == "complex":
            return complex(rest[0], rest[1])
        if tag == "range":
            return range(*self._all(rest))
        if tag == "decimal":
            return decimal.Decimal(rest[0])
        if tag == "fraction":
            return fractions.Fraction(*self._all(rest))
        if tag == "timedelta":
            return datetime.timedelta(*rest)
        if tag in _MOMENTS:
            return _MOMENTS[tag].fromisoformat(rest[0])  # type: ignore[attr-defined]
        if tag == "type":
            return _TYPES[rest[0]]
        if tag == "array":
            return _decode_array(rest)
        raise WireError(f"unknown tag {str(tag)[:20]!r}")

    def _all(self, items: Iterable[Any]) -> list[Any]:
        return [self.decode(item) for item in items]


# -- NumPy, where the program has imported it --------------------------------------------------------


def _encode_array(value: Any) -> list[Any] | None:
    numpy = sys.modules.get("numpy")
    if numpy is None or not isinstance(value, (numpy.ndarray, numpy.generic)) or value.dtype.kind not in "biufcSU":
        return None
    array = numpy.ascontiguousarray(value)
    shape = list(numpy.shape(value))
    return ["array", array.dtype.str, shape, base64.b64encode(array.tobytes()).decode("ascii")]


def _decode_array(rest: list[Any]) -> Any:
    import numpy

    kind, shape, data = rest
    dtype = numpy.dtype(str(kind))
    if dtype.kind not in "biufcSU":
        raise WireError("an array of objects")
    return numpy.frombuffer(base64.b64decode(data), dtype).reshape(shape).copy()[()]
