"""What a person sees: live progress on a terminal, plain lines in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Progress:
    """Prints from the first process only. `phase` shows the work inside a step; `line` is one step's summary."""

    def __init__(self, enabled: bool):
        from rich.console import Console

        self.enabled = enabled
        self.live = enabled and sys.stdout.isatty()
        self.console = Console(highlight=False, soft_wrap=not self.live)
        self._status: Any = None
        self._text = self._beside = ""

    def line(self, text: str) -> None:
        if self.enabled:
            self.console.print(text, markup=False)
            if not self.live:
                sys.stdout.flush()

    def table(self, title: str, columns: list[str], rows: list[list[str]]) -> None:
        if not self.enabled:
            return
        from rich.table import Table

        table = Table(title=title, title_justify="left")
        for i, column in enumerate(columns):
            table.add_column(column, justify="left" if i == 0 else "right")
        for row in rows:
            table.add_row(*row)
        self.console.print(table)
        sys.stdout.flush()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A spinner with `name` on a terminal; nothing in a log."""
        if not self.live:
            yield
            return
        with self.console.status(name) as status:
            self._status = status
            self.update(name)
            try:
                yield
            finally:
                self._status = None

    def update(self, text: str) -> None:
        """Changes the text of the running phase."""
        self._text = text
        self._show()

    def beside(self, text: str) -> None:
        """What another thread does meanwhile, after the text of the running phase; from any thread."""
        self._beside = text
        self._show()

    def _show(self) -> None:
        status = self._status  # another thread may be ending the phase
        if status is not None:
            status.update(" · ".join(filter(None, [self._text, self._beside])))

    @contextmanager
    def bar(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        """A progress bar on a terminal, nothing in a log; what it yields is called with the number of things done."""
        if not self.live:
            yield lambda done: None
            return
        from rich.progress import Progress as Bar

        with Bar(console=self.console, transient=True) as bar:
            task = bar.add_task(name, total=total)
            yield lambda done: bar.advance(task, done)

    def samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        """A few completions with their rewards."""
        if not self.enabled:
            return
        for row in rows:
            self.line(f"--- step {step}, reward {row['reward']}, answer {row['answer']!r}, {row['finish_reason']}")
            self.line(_shorten(row["prompt_text"], 300))
            self.line(">>> " + _shorten(row["completion"], 700))


class Timer:
    """Seconds spent in named phases: `with timer("rollout"): ...`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def _shorten(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[: limit // 2]} ... {text[-limit // 2 :]}"
