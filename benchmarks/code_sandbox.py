"""Small programs per second: the sandboxes of `rewards.code` and plain subprocess.

Each program reads a number and prints its double; an assert test calls a function. "subprocess" starts the same
interpreter on the same program with no isolation, limits or comparison: the least that anybody pays per program.
Every setting runs in turn, `--rounds` times; the best round counts.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from common import machine, markdown_table, write_json

from rewards.code import SandboxUnavailable, check_sandbox, run_tests

SCRIPT = "print(int(input()) * 2)"
FUNCTION = "def double(x):\n    return x * 2\n"


def plain(i: int) -> None:
    ended = subprocess.run([sys.executable, "-c", SCRIPT], input=f"{i}\n", capture_output=True, text=True, check=True)
    assert int(ended.stdout) == 2 * i


def stdio(sandbox: str, tests: int) -> Callable[[int], None]:
    def run(i: int) -> None:
        cases = [{"type": "stdio", "input": f"{i}\n", "output": f"{2 * i}\n"}] * tests
        assert run_tests(SCRIPT, cases, sandbox=sandbox).all_passed

    return run


def asserts(sandbox: str, tests: int) -> Callable[[int], None]:
    def run(i: int) -> None:
        cases = [{"type": "assert", "code": f"assert double({i}) == {2 * i}"}] * tests
        assert run_tests(FUNCTION, cases, sandbox=sandbox).all_passed

    return run


def per_second(run: Callable[[int], None], programs: int, workers: int) -> float:
    start = time.perf_counter()
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(run, range(programs)))
    return programs / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", type=int, default=100, help="programs per measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="programs at a time")
    parser.add_argument("--json", metavar="OUT", help="also write every number here")
    options = parser.parse_args()
    settings: dict[str, Callable[[int], None]] = {"subprocess": plain}
    for sandbox in ("namespaces", "bubblewrap", "none"):
        try:
            check_sandbox(sandbox)
        except SandboxUnavailable as error:
            print(f"{sandbox} left out: {error}", file=sys.stderr)
            continue
        settings[f"{sandbox}, 1 stdio test"] = stdio(sandbox, 1)
        settings[f"{sandbox}, 1 assert test"] = asserts(sandbox, 1)
        settings[f"{sandbox}, 10 stdio tests"] = stdio(sandbox, 10)
        settings[f"{sandbox}, 10 assert tests"] = asserts(sandbox, 10)
    measured: dict[str, dict[str, list[float]]] = {name: {str(n): [] for n in options.workers} for name in settings}
    for _ in range(options.rounds):
        for name, run in settings.items():
            for workers in options.workers:
                measured[name][str(workers)].append(per_second(run, options.programs, workers))
                print(f"{name}, {workers} at a time: {measured[name][str(workers)][-1]:.1f}/s", file=sys.stderr)
    rows = [
        [name, *(f"{max(by_workers[str(n)]):.1f}" for n in options.workers)] for name, by_workers in measured.items()
    ]
    print(markdown_table(["programs per second", *(f"{n} at a time" for n in options.workers)], rows))
    write_json(options.json, {"machine": machine(max(options.workers)), "per_second": measured})


if __name__ == "__main__":
    main()
