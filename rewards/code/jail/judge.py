"""The child that runs a test. The program runs in another sandbox; here are only stand-ins for its names.

The test's `assert`, its built-ins, its imports and its comparisons are this process's own, and what comes from
the program is plain data or a `Handle`, so the program has no part in the verdict but the values it returns.
"""

import ast
import builtins
import json
import os
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

from . import collected, names, stdio
from .peer import Peer, ProcessExit
from .wire import Closed, Pipe, WireError

_MODULE = "__test__"


class ProgramLost(BaseException):
    """The program's process ended or no longer speaks the protocol: no test can swallow this by
    `except Exception`, and a test that does otherwise still fails."""


class Handle:
    """An object of the program's that is not plain data.

    What reads it is forwarded to the program. What compares or computes is not: `==` is identity, `in` compares
    here, item by item, and there are no operators, since these would hand the expected value to the program or
    let it decide the outcome.
    """

    __slots__ = ("_forward", "_kind")

    def __init__(self, forward: Callable[..., Any], kind: str) -> None:
        object.__setattr__(self, "_forward", forward)
        object.__setattr__(self, "_kind", kind)

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return self._forward("call", *arguments, **keywords)

    def __getattr__(self, name: str) -> Any:
        return self._forward("getattr", name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._forward("setattr", name, value)

    def __delattr__(self, name: str) -> None:
        self._forward("delattr", name)

    def __getitem__(self, key: Any) -> Any:
        return self._forward("getitem", key)

    def __setitem__(self, key: Any, value: Any) -> None:
        self._forward("setitem", key, value)

    def __delitem__(self, key: Any) -> None:
        self._forward("delitem", key)

    def __iter__(self) -> Iterator[Any]:
        iterator = self._forward("iter")
        return iterator if isinstance(iterator, Handle) else iter(iterator)

    def __next__(self) -> Any:
        return self._forward("next")

    def __contains__(self, value: Any) -> bool:
        return any(value is item or value == item for item in self)

    def __len__(self) -> int:
        return int(self._forward("len"))

    def __bool__(self) -> bool:
        return bool(self._forward("bool"))

    def __int__(self) -> int:
        return int(self._forward("int"))

    def __float__(self) -> float:
        return float(self._forward("float"))

    def __str__(self) -> str:
        return str(self._forward("str"))

    def __repr__(self) -> str:
        return str(self._forward("repr"))

    def __enter__(self) -> Any:
        return self._forward("enter")

    def __exit__(self, *error: object) -> None:
        self._forward("exit")

    def __copy__(self) -> Any:
        return self._forward("copy")

    def __deepcopy__(self, memo: object) -> Any:
        return self._forward("deepcopy")

    def __instancecheck__(self, value: object) -> bool:
        """`isinstance(value, Class)` with a class of the program's: only its own objects can be instances."""
        return isinstance(value, Handle) and bool(self._forward("isinstance", value))


def prepare(fds: list[int]) -> Callable[[], None]:
    """fds: test, stdin, stdout, stderr, pipe to read, pipe to write, pipe for the verdict."""
    source = stdio.read_all(fds[0])
    stdio.take_over(fds[1:])
    stdio.open_streams()

    def run() -> None:
        outcome, detail = _judge(source, Pipe(3, 4))
        os.write(5, json.dumps([outcome, detail[:500]]).encode())
        os._exit(0)

    return run


def _judge(source: bytes, pipe: Pipe) -> tuple[str, str]:
    try:
        tree = ast.parse(source)
        code = compile(tree, "test.py", "exec")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return "sandbox_error", f"the test is not a program: {error}"
    lost: list[tuple[str, str]] = []
    raised: list[BaseException] = []
    peer = Peer(pipe, _operate, lambda peer, number, name: _stand_in(_forwarder(peer, number, lost, raised), name))
    forward = _forwarder(peer, None, lost, raised)
    try:
        wanted = names.sort_out(tree)
    except ImportError as error:
        return "sandbox_error", f"the test needs what is not here: {error}"
    if not names.uses_program(tree, wanted):
        return "sandbox_error", "the test uses nothing of the program"
    try:
        forward("load")
        given = {name: value for name, value in forward("globals", *wanted.asked)}
        module = _module({**given, **wanted.own})
        if wanted.imports_program:
            sys.modules[names.PROGRAM] = names.program_module(given)
        _execute(tree, code, module)
    except ProgramLost:
        pass
    except BaseException as error:
        if not lost:
            return _failure(error, any(error is own_error for own_error in raised))
    if lost:
        return lost[0]
    return "passed", ""


def _module(scope: dict[str, Any]) -> types.ModuleType:
    """The test's module, where dataclasses and unittest look for it."""
    module = types.ModuleType(_MODULE)
    module.__dict__.update({**scope, "__builtins__": builtins})
    sys.modules[_MODULE] = sys.modules["__main__"] = module
    return module


def _execute(tree: ast.Module, code: types.CodeType, module: types.ModuleType) -> None:
    status: object = None
    try:
        exec(code, module.__dict__)
    except SystemExit as error:  # the test's own, such as unittest.main(); the program's is a ProcessExit
        status = error.code
    collected.run(tree, module)
    assert not status, f"the test ended with status {status}"


def _failure(error: BaseException, of_program: bool) -> tuple[str, str]:
    detail = f"{type(error).__name__}: {error}"
    if isinstance(error, ModuleNotFoundError) and not of_program:
        return "sandbox_error", f"the test needs what is not here: {error}"
    if isinstance(error, MemoryError):
        return "memory", detail
    if isinstance(error, AssertionError) and not of_program:
        return "wrong_answer", detail
    return "runtime_error", detail


def _stand_in(forward: Callable[..., Any], kind: str) -> Any:
    if kind != "coroutine":
        return Handle(forward, kind)

    async def result() -> Any:
        return forward("await")

    return result()  # asyncio.run() takes nothing but real ones


def _forwarder(
    peer: Peer, number: int | None, lost: list[tuple[str, str]], raised: list[BaseException]
) -> Callable[..., Any]:
    """A function that asks the program; `lost` notes how the program was lost, `raised` its exceptions."""

    def forward(operation: str, *arguments: Any, **keywords: Any) -> Any:
        if lost:
            raise ProgramLost
        try:
            return peer.request(operation, number, *arguments, **keywords)
        except Closed:
            lost.append(("runtime_error", "the program ended before the test did"))
        except WireError as error:
            lost.append(("runtime_error", f"the program sent what is no value: {error}"))
        except ProcessExit as error:
            lost.append(("runtime_error", f"the program raised {error}"))
        except MemoryError:
            lost.append(("memory", "the program, or a value that it sent, needs too much memory"))
        except Exception as error:
            raised.append(error)
            raise
        raise ProgramLost

    return forward


# -- what the program may do with objects of the test -----------------------------------------------


_READ: dict[str, Callable[[Any], Any]] = {"iter": iter, "len": len, "str": str}


def _operate(operation: str, target: Any, arguments: list[Any], keywords: dict[str, Any]) -> Any:
    """Call functions, advance iterators, use the public attributes of objects of the test's own classes.

    Nothing here leads on to a function's globals, a frame or a module, where expected values lie.
    """
    # A metaclass would make classes here, with the program's functions as their __eq__.
    metaclass = isinstance(target, type) and issubclass(target, type)
    if operation == "call" and callable(target) and not metaclass:
        return target(*arguments, **keywords)
    if operation == "next" and isinstance(target, Iterator):
        return next(target)
    if operation == "iter" and isinstance(target, Iterator):
        return target
    kind = type(target)
    if kind.__module__ == _MODULE and not isinstance(target, type):
        if operation in ("getattr", "setattr"):
            name = arguments[0]
            if type(name) is str and not name.startswith("_"):
                if operation == "getattr":
                    return getattr(target, name)
                if not hasattr(kind, name):
                    return setattr(target, name, arguments[1])
        elif operation in ("iter", "len", "str"):
            return _READ[operation](target)
        elif operation == "getitem":
            return target[arguments[0]]
    if operation == "getattr":
        raise AttributeError(f"the test does not show attributes of a {kind.__name__}")
    raise TypeError(f"the test does not allow {operation!r} on a {kind.__name__}")
