"""The program that compares answers symbolically: `python -m rewards.math.worker`, started by `pool`.

Requests come on stdin and replies go to stdout, one JSON object per line (JSON escapes every odd character):

    {"answer": str, "gold": str, "limit_s": float}  ->  {"equal": bool | null, "retire": bool}

`equal` is null if the comparison ran out of memory. An answer that cannot be compared is not equal. `retire`
says that this worker should be replaced.

A worker outlives neither its parent nor a request. Its stdin closes when the parent ends in any way; a thread
notices that in mid-computation. A computation that never yields to that thread (one big multiplication of
integers) is ended by a watchdog in C. Neither needs a signal, a parent's thread or Linux.
"""

import faulthandler
import json
import os
from collections.abc import Callable
from queue import SimpleQueue
from threading import Thread
from typing import BinaryIO

Compare = Callable[[str, str], bool]

READY = b"rewards.math.worker is ready\n"

# Address space. sympy needs some 0.2 GiB; answers that need ten times as much are not answers.
MEMORY_LIMIT = 2 * 2**30
# sympy's caches grow with every expression: start afresh before they matter.
MAX_REQUESTS = 5_000
MAX_RESIDENT = 512 * 2**20
# The parent kills at the limit. The watchdog, for when the parent is gone, leaves it the first word.
WATCHDOG_GRACE_S = 1.0


def serve(load: Callable[[], Compare]) -> None:
    """Answer requests until stdin closes. `load` does the slow imports; if it raises, the traceback goes to stderr."""
    _limit_resources()
    requests, replies = _take_over_pipes()
    inbox: SimpleQueue[bytes] = SimpleQueue()
    Thread(target=_receive, args=(requests, inbox), daemon=True).start()
    compare = load()
    _silence_stderr()
    replies.write(b"\n" + READY)  # a line of its own, whatever was printed before this program took over
    replies.flush()
    served = 0
    while True:
        equal = _answer(compare, json.loads(inbox.get()))
        served += 1
        retire = equal is None or served >= MAX_REQUESTS or _resident() > MAX_RESIDENT
        replies.write(json.dumps({"equal": equal, "retire": retire}).encode() + b"\n")
        replies.flush()


def _answer(compare: Compare, request: dict[str, object]) -> bool | None:
    faulthandler.dump_traceback_later(float(str(request["limit_s"])) + WATCHDOG_GRACE_S, exit=True)
    try:
        return bool(compare(str(request["answer"]), str(request["gold"])))
    except MemoryError:
        return None
    except Exception:  # RecursionError, and whatever sympy raises on odd expressions: not shown to be equal
        return False
    finally:
        faulthandler.cancel_dump_traceback_later()


def _receive(requests: BinaryIO, inbox: "SimpleQueue[bytes]") -> None:
    for line in requests:
        inbox.put(line)
    os._exit(0)


def _take_over_pipes() -> tuple[BinaryIO, BinaryIO]:
    """stdin and stdout under new descriptors, so that nothing that reads or prints can corrupt the exchange."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    os.close(null)
    return requests, replies


def _silence_stderr() -> None:
    """The parent reads stderr only to explain a failed start; later output would fill the pipe and block."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    os.close(null)


def _limit_resources() -> None:
    import resource

    for limit, value in ((resource.RLIMIT_AS, MEMORY_LIMIT), (resource.RLIMIT_CORE, 0)):
        _, hard = resource.getrlimit(limit)
        if hard != resource.RLIM_INFINITY:
            value = min(value, hard)
        try:
            resource.setrlimit(limit, (value, value))
        except (ValueError, OSError):
            pass  # macOS refuses to limit the address space; the deadline still holds


def _resident() -> int:
    """Bytes of memory in use; 0 where there is no /proc (the peak from getrusage may be the parent's)."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def _load_symbolic() -> Compare:
    from .symbolic import symbolically_equal

    symbolically_equal("x + 1", "1 + x")  # sympy imports much of itself on first use: not on a request's time
    return symbolically_equal


if __name__ == "__main__":
    serve(_load_symbolic)
