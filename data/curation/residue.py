"""What a page that a statement was copied from leaves behind it: hints, solvers' figures, signatures.

Contest problems often come from a wiki, whose page goes on after the statement. Such text may give the solution
away ("Let AP = x ..."), and two copies of a problem with different residue do not look like duplicates.
"""

import re
from dataclasses import replace

from data.curation.problem import Problem

# A heading alone on its line, or a reader's "note:" in small letters (the contest's own notes begin with a capital).
_AFTERWARDS = re.compile(r"\n\s*(?:(?:Diagram|Hint|Solution(?: \d+)?|See also)\s*(?:\n|\Z)|note:).*\Z", re.DOTALL)
_SIGNATURES = re.compile(r"(?:\s+~\s?[A-Za-z][\w.]*)+\s*\Z")


def cut_residue(statement: str) -> str:
    """The statement without what follows it on the page."""
    return _SIGNATURES.sub("", _AFTERWARDS.sub("", statement)).rstrip() or statement


def without_residue(problem: Problem) -> Problem:
    """The problem with its statement cut; code problems stay as they are."""
    if problem.kind == "code":
        return problem
    return replace(problem, statement=cut_residue(problem.statement))
