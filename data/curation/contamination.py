"""Decontamination: problems that are, or hold, a statement of a named evaluation set.

An evaluation statement is found in a problem if, after normalisation (typesetting, case and punctuation do not matter),

- the two are equal;
- it is short (fewer words than an n-gram has), holds a number, and stands in the problem as a run of tokens;
- the problem holds at least the share `coverage` of its word n-grams, wherever text was put before, after or between.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from data.curation.choices import find_choices
from data.curation.problem import Rejected
from data.curation.residue import cut_residue
from data.curation.spec import ContaminationSpec
from data.curation.statements import tokens, words


@dataclass(frozen=True)
class EvaluationProblem:
    """A problem of an evaluation set, by the name of the set and its place there."""

    set: str
    place: str
    statement: str


@dataclass(frozen=True)
class Match:
    """Where a problem was found in an evaluation set, and how sure that is."""

    kind: str  # "equal", "contained" or "n-grams"
    problem: EvaluationProblem
    coverage: float

    def rejected(self, ngram: int) -> Rejected:
        how = {
            "equal": "the same statement",
            "contained": "it contains the statement",
            "n-grams": f"it holds {self.coverage:.0%} of the {ngram}-grams",
        }[self.kind]
        return Rejected(
            f"in the evaluation set {self.problem.set}", f"{how} of {self.problem.set}, {self.problem.place}"
        )


class ContaminationIndex:
    """The statements of all evaluation sets, ready to be looked for."""

    def __init__(self, problems: Iterable[EvaluationProblem], spec: ContaminationSpec):
        self.spec = spec
        self.size = 0
        self._equal: dict[tuple[str, ...], EvaluationProblem] = {}
        self._short: dict[tuple[str, ...], list[tuple[tuple[str, ...], EvaluationProblem]]] = defaultdict(list)
        self._grams: dict[tuple[str, ...], list[int]] = defaultdict(list)
        self._long: list[tuple[EvaluationProblem, int]] = []  # with the number of its n-grams
        for problem in problems:
            self.size += 1
            # Problems lose their options and residue, so an evaluation statement is looked for without its own as well.
            forms = [problem.statement, cut_residue(problem.statement)]
            choices = find_choices(forms[1])
            forms += [choices.statement] if choices is not None else []
            for form in dict.fromkeys(map(tokens, forms)):
                self._add(problem, form)

    def find(self, statement: str) -> Match | None:
        """The evaluation problem that this statement is or holds; the best one if there are several."""
        form = tokens(statement)
        if form in self._equal:
            return Match("equal", self._equal[form], 1.0)
        return self._find_contained(form) or self._find_grams(words(form))

    def _add(self, problem: EvaluationProblem, form: tuple[str, ...]) -> None:
        self._equal.setdefault(form, problem)
        grams = _grams(words(form), self.spec.ngram)
        if grams:
            for gram in grams:
                self._grams[gram].append(len(self._long))
            self._long.append((problem, len(grams)))
        elif len(form) >= self.spec.contained and any(token[0].isdigit() for token in form):
            self._short[form[: self.spec.contained]].append((form, problem))

    def _find_contained(self, form: Sequence[str]) -> Match | None:
        length = self.spec.contained
        for i in range(len(form) - length + 1):
            for short, problem in self._short.get(tuple(form[i : i + length]), ()):
                if tuple(form[i : i + len(short)]) == short:
                    return Match("contained", problem, 1.0)
        return None

    def _find_grams(self, of: Sequence[str]) -> Match | None:
        hits = Counter(i for gram in _grams(of, self.spec.ngram) for i in self._grams.get(gram, ()))
        shares = [(count / self._long[i][1], -i) for i, count in hits.items()]
        share, place = max(shares, default=(0.0, 0))
        return Match("n-grams", self._long[-place][0], share) if share >= self.spec.coverage else None


def _grams(of: Sequence[str], length: int) -> set[tuple[str, ...]]:
    return {tuple(of[i : i + length]) for i in range(len(of) - length + 1)}
