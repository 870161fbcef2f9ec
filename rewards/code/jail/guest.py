"""The child that holds the program while a test, in another sandbox, calls it."""

import copy
import os
import sys
import types
from collections.abc import Callable
from typing import Any

from . import stdio
from .peer import Peer
from .wire import Pipe

# Not "__main__": a test imports the program, it does not run it as a script.
_MODULE = "solution"


class FromTest:
    """Something of the test's that is not plain data: a function, an iterator or an object of a test's class.

    The test decides what the program may do with it (see `judge`).
    """

    def __init__(self, peer: Peer, number: int) -> None:
        def ask(operation: str, *arguments: Any, **keywords: Any) -> Any:
            return peer.request(operation, number, *arguments, **keywords)

        object.__setattr__(self, "_ask", ask)

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return self._ask("call", *arguments, **keywords)

    def __getattr__(self, name: str) -> Any:
        return self._ask("getattr", name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._ask("setattr", name, value)

    def __iter__(self) -> Any:
        return self._ask("iter")

    def __next__(self) -> Any:
        return self._ask("next")

    def __len__(self) -> int:
        return int(self._ask("len"))

    def __getitem__(self, key: Any) -> Any:
        return self._ask("getitem", key)

    def __bool__(self) -> bool:
        return True

    def __str__(self) -> str:
        return str(self._ask("str"))


def prepare(fds: list[int]) -> Callable[[], None]:
    """fds: program, stdin, stdout, stderr, pipe to read, pipe to write."""
    source = stdio.read_all(fds[0])
    stdio.take_over(fds[1:])
    stdio.open_streams()
    module = types.ModuleType(_MODULE)

    def operate(operation: str, target: Any, arguments: list[Any], keywords: dict[str, Any]) -> Any:
        if operation == "load":
            sys.modules[_MODULE] = module
            exec(compile(source, "program.py", "exec"), module.__dict__)
            return None
        if operation == "globals":
            return [[name, module.__dict__[name]] for name in arguments if name in module.__dict__]
        return _OPERATIONS[operation](target, *arguments, **keywords)

    peer = Peer(Pipe(3, 4), operate, lambda peer, number, name: FromTest(peer, number))

    def run() -> None:
        try:
            peer.serve_forever()
        finally:
            os._exit(0)

    return run


def _await(target: Any) -> Any:
    import asyncio  # slow to import, and few programs need it

    return asyncio.run(target)


_OPERATIONS: dict[str, Callable[..., Any]] = {
    "call": lambda target, *arguments, **keywords: target(*arguments, **keywords),
    "getattr": getattr,
    "setattr": setattr,
    "delattr": delattr,
    "getitem": lambda target, key: target[key],
    "setitem": lambda target, key, value: target.__setitem__(key, value),
    "delitem": lambda target, key: target.__delitem__(key),
    "iter": iter,
    "next": next,
    "len": len,
    "bool": bool,
    "int": int,
    "float": float,
    "str": str,
    "repr": repr,
    "await": lambda target: _await(target),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "enter": lambda target: target.__enter__(),
    "exit": lambda target: target.__exit__(None, None, None),
    "isinstance": lambda target, value: isinstance(value, target),
}
