"""One end of the connection between the test and the program: calls either way, each waiting for its answer.

A request is [operation, target, arguments, keywords] and the answer ["value", result, restored] or
["raise", class, arguments]. While one side waits it serves the other's requests, so the program can call a
function that the test gave it. Mutable built-in arguments are copied there and, with their new contents, back.
"""

import builtins
from collections.abc import Callable
from typing import Any

from .wire import Closed, Decoder, Encoder, Pipe, WireError

MAX_NESTED = 200


class RemoteError(Exception):
    """An exception whose class only the other side has."""


class ProcessExit(BaseException):
    """The other side raised what ends or interrupts a process: SystemExit, KeyboardInterrupt, ..."""


class Peer:
    """See the module; one per test and side."""

    def __init__(
        self,
        pipe: Pipe,
        operate: Callable[[str, Any, list[Any], dict[str, Any]], Any],
        stand_in: Callable[["Peer", int, str], Any],
    ) -> None:
        """operate: carries out an operation on an object of this side, or refuses; stand_in: makes the object
        that stands for one of the other side."""
        self._pipe = pipe
        self._operate = operate
        self._stand_in = stand_in
        self._exported: dict[int, Any] = {}
        self._ids: dict[int, int] = {}  # id() of an exported object, which _exported keeps alive
        self._imported: dict[int, Any] = {}
        self._imported_ids: dict[int, int] = {}
        self._nested = 0

    def request(self, operation: str, target: int | None, *arguments: Any, **keywords: Any) -> Any:
        encoder = Encoder(self._export)
        sent = [encoder.encode(argument) for argument in arguments]
        named = [[name, encoder.encode(value)] for name, value in keywords.items()]
        self._pipe.send([operation, target, sent, named])
        while True:
            answer = self._pipe.receive()
            if answer[:1] == ["value"]:
                return self._accept(answer, encoder.containers)
            if answer[:1] == ["raise"]:
                raise self._exception(answer)
            self._serve(answer)

    def serve_forever(self) -> None:
        """Answer requests until the other side is gone."""
        try:
            while True:
                self._serve(self._pipe.receive())
        except Closed:
            return

    def handle_of(self, stand_in: object) -> int | None:
        return self._imported_ids.get(id(stand_in))

    def _accept(self, answer: list[Any], known: dict[int, Any]) -> Any:
        try:
            _, result, restored = answer
            decoder = Decoder(self._resolve, known)
            value = decoder.decode(result)
            for key, contents in restored:
                decoder.restore(known[key], contents)
        except (ValueError, KeyError, TypeError, IndexError):
            raise WireError("not an answer") from None
        return value

    def _serve(self, message: list[Any]) -> None:
        self._nested += 1
        try:
            if self._nested > MAX_NESTED:
                raise WireError("calls nested too deeply")
            self._pipe.send(self._answer(message))
        finally:
            self._nested -= 1

    def _answer(self, message: list[Any]) -> list[Any]:
        try:
            operation, target, sent, named = message
            decoder = Decoder(self._resolve)
            arguments = [decoder.decode(value) for value in sent]
            keywords = {str(name): decoder.decode(value) for name, value in named}
            subject = None if target is None else self._exported[target]
        except (ValueError, KeyError, TypeError):
            raise WireError("not a request") from None
        try:
            result = self._operate(str(operation), subject, arguments, keywords)
            encoder = Encoder(self._export, decoder.containers)
            encoded = encoder.encode(result)
            restored = [[key, encoder.contents(value)] for key, value in decoder.containers.items()]
            return ["value", encoded, restored]
        except (Closed, WireError):
            raise
        except BaseException as error:
            return _describe(error)

    def _export(self, value: Any) -> list[Any]:
        theirs = self._imported_ids.get(id(value))
        if theirs is not None:
            return ["yours", theirs]
        if id(value) not in self._ids:
            number = len(self._exported)
            self._exported[number] = value
            self._ids[id(value)] = number
        return ["handle", self._ids[id(value)], type(value).__name__]

    def _resolve(self, tagged: list[Any]) -> Any:
        if tagged[0] == "yours":
            return self._exported[tagged[1]]
        _, number, name = tagged
        if not isinstance(number, int):
            raise WireError("not a handle")
        if number not in self._imported:
            made = self._stand_in(self, number, str(name))
            self._imported[number] = made
            self._imported_ids[id(made)] = number
        return self._imported[number]

    def _exception(self, answer: list[Any]) -> BaseException:
        try:
            _, name, arguments = answer
            decoder = Decoder(self._resolve)
            values = [decoder.decode(value) for value in arguments]
        except (ValueError, TypeError):
            raise WireError("not an answer") from None
        return rebuild(str(name), values)


def rebuild(name: str, arguments: list[Any]) -> BaseException:
    """The exception to raise here for one of class `name` there."""
    kind = getattr(builtins, name, None)
    if isinstance(kind, type) and issubclass(kind, BaseException):
        if not issubclass(kind, Exception):
            return ProcessExit(name)
        try:
            return kind(*arguments)
        except TypeError:  # UnicodeDecodeError and its like want arguments of certain types
            pass
    return RemoteError(name, *arguments)


def _describe(error: BaseException) -> list[Any]:
    """The nearest built-in class and the arguments, as far as they are simple."""
    for kind in type(error).__mro__:
        if getattr(builtins, kind.__name__, None) is kind:
            break
    arguments = [value for value in error.args if type(value) in (str, int, float, bool, type(None))]
    if len(arguments) != len(error.args):
        arguments = [str(error)[:2000]]
    encoder = Encoder(lambda value: ["tuple", []])
    return ["raise", kind.__name__, [encoder.encode(value) for value in arguments]]
