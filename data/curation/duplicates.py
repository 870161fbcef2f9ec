"""Duplicates within and across sources: exact after normalisation, then near ones by the similarity of shingles.

Numbers matter: two problems that differ only in their numbers are two problems. Near duplicates must have the same
numbers (in digits or in words), the same words in capitals and the same answer. The similarity (Jaccard's) is exact,
not estimated: within such a group, only sets that share one of their rarest shingles can be similar enough ("prefix
filtering"), so few pairs are compared.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence

from data.curation.problem import Problem, Rejected
from data.curation.spec import DuplicateSpec
from data.curation.statements import marks, tokens

Shingle = tuple[str, ...]


def find_duplicates(problems: Sequence[Problem], spec: DuplicateSpec) -> dict[int, Rejected]:
    """Index of each problem to be left out, with the reason. The first of several is kept.

    Exact duplicates whose answers differ are all left out: at least one gold is wrong, and nobody knows which.
    """
    forms = [tokens(problem.statement) for problem in problems]
    found = _exact(problems, forms) if spec.exact else {}
    if spec.near is not None:
        left = [i for i in range(len(problems)) if i not in found]
        shingles = [shingle_set(forms[i], spec.shingle) for i in left]
        groups: list[Hashable] = [(_answer(problems[i]), marks(problems[i].statement)) for i in left]
        for later, (earlier, similarity) in near_duplicates(shingles, groups, spec.near).items():
            detail = f"{similarity:.2f} like {_name(problems[left[earlier]])}"
            found[left[later]] = Rejected("near duplicate", detail)
    return found


def shingle_set(of: Sequence[str], length: int) -> frozenset[Shingle]:
    """All runs of `length` tokens; of a shorter statement the statement itself."""
    return frozenset(tuple(of[i : i + length]) for i in range(max(1, len(of) - length + 1)))


def near_duplicates(
    sets: Sequence[frozenset[Shingle]], groups: Sequence[Hashable], least: float
) -> dict[int, tuple[int, float]]:
    """later -> (earlier, similarity) for each set that is at least so similar to an earlier, kept one of its group."""
    frequency = Counter(shingle for one in sets for shingle in one)
    index: dict[tuple[Hashable, Shingle], list[int]] = defaultdict(list)
    found: dict[int, tuple[int, float]] = {}
    for i, one in enumerate(sets):
        rarest = sorted(one, key=lambda shingle: (frequency[shingle], shingle))
        # If |a & b| >= least * |a|, they share one of a's first |a| - ceil(least * |a|) + 1; likewise for b.
        prefix = rarest[: len(rarest) - math.ceil(least * len(rarest) - 1e-9) + 1]
        candidates = sorted({j for shingle in prefix for j in index[groups[i], shingle]})
        similar = ((j, len(one & sets[j]) / len(one | sets[j])) for j in candidates)
        match = next(((j, value) for j, value in similar if value >= least), None)
        if match is not None:
            found[i] = match
            continue
        for shingle in prefix:
            index[groups[i], shingle].append(i)
    return found


def _exact(problems: Sequence[Problem], forms: Sequence[tuple[str, ...]]) -> dict[int, Rejected]:
    same: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for i, form in enumerate(forms):
        same[form].append(i)
    found = {}
    for first, *others in same.values():
        conflict = next((i for i in others if _answer(problems[i]) != _answer(problems[first])), None)
        if conflict is not None:
            golds = f"{_name(problems[first])} says {problems[first].answer}, {_name(problems[conflict])} says "
            reason = Rejected("duplicates with different answers", golds + problems[conflict].answer)
            found.update(dict.fromkeys([first, *others], reason))
        else:
            found.update(dict.fromkeys(others, Rejected("exact duplicate", f"of {_name(problems[first])}")))
    return found


def _answer(problem: Problem) -> str:
    """What tells golds apart; programs that solve a task may differ."""
    return "" if problem.kind == "code" else " ".join(tokens(problem.answer))


def _name(problem: Problem) -> str:
    return f"{problem.source}, {problem.place}"
