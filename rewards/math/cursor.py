"""Reading tokens one by one and bracket by bracket."""

from .tokens import Token, Unreadable

PAIRS = {"(": (")", "]"), "[": ("]", ")"), "{": ("}",), "{set": ("}set",),
          "lfloor": ("rfloor",), "lceil": ("rceil",), "langle": ("rangle",)}  # fmt: skip
_CLOSING = {close for closes in PAIRS.values() for close in closes}


def opens(token: Token) -> bool:
    """Does the token begin a bracket?"""
    return token.kind == "begin" or token.kind in ("symbol", "command") and token.text in PAIRS


def closes(token: Token) -> bool:
    """Does the token end a bracket?"""
    return token.kind == "end" or token.kind in ("symbol", "command") and token.text in _CLOSING


def split(tokens: list[Token], *separators: str) -> list[list[Token]]:
    """The tokens between separators that stand outside every bracket."""
    parts: list[list[Token]] = [[]]
    depth = 0
    for token in tokens:
        depth += opens(token) - closes(token)
        if depth == 0 and token.kind in ("symbol", "command") and token.text in separators:
            parts.append([])
        else:
            parts[-1].append(token)
    return parts


class Cursor:
    """A place in a list of tokens."""

    def __init__(self, tokens: list[Token]) -> None:
        self.tokens = tokens
        self.at = 0

    def peek(self) -> Token | None:
        return self.tokens[self.at] if self.at < len(self.tokens) else None

    def sees(self, *texts: str) -> bool:
        token = self.peek()
        return token is not None and token.kind in ("symbol", "command") and token.text in texts

    def take(self) -> Token:
        if self.at >= len(self.tokens):
            raise Unreadable("ends too early")
        self.at += 1
        return self.tokens[self.at - 1]

    def accept(self, *texts: str) -> bool:
        if self.sees(*texts):
            self.at += 1
            return True
        return False

    def group(self) -> tuple[str, list[Token], str]:
        """The bracket that begins here: its opening, what is inside, its closing."""
        start = self.at
        depth = 0
        for index in range(start, len(self.tokens)):
            depth += opens(self.tokens[index]) - closes(self.tokens[index])
            if depth == 0:
                self.at = index + 1
                return self.tokens[start].text, self.tokens[start + 1 : index], self.tokens[index].text
        raise Unreadable("a bracket is not closed")
