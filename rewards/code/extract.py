"""The program in a completion: its last fenced block."""

import re

from ..math.extract import answer_text

# A fence is at least three backticks or tildes at the start of a line, indented by at most three spaces.
_FENCE = re.compile(r"^ {0,3}(`{3,}|~{3,})[ \t]*([^\n`]*?)[ \t\r]*$", re.MULTILINE)
_LANGUAGES = frozenset({"", "python", "py", "python3"})


def extract_program(completion: str) -> str | None:
    """The content of the last fenced block marked python, py or not at all; None without one.

    Only text after the last `</think>` counts, and thinking that never ends has no program. A fence that is never
    closed has none either: the completion was cut off, and an earlier block is not what it meant to answer.
    """
    text = answer_text(completion)
    if text is None:
        return None
    program, opened = None, None
    for fence in _FENCE.finditer(text):
        marks, info = fence.groups()
        if opened is None:
            opened = fence
        elif not info and marks[0] == opened[1][0] and len(marks) >= len(opened[1]):
            language = opened[2].split()[0].lower() if opened[2].split() else ""
            if language in _LANGUAGES:
                program = text[opened.end() + 1 : fence.start()]
            opened = None
    if opened is not None or program is None:
        return None
    return program.replace("\r\n", "\n") if program.strip() else None
