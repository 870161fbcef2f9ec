"""Verification of mathematical answers: `extract` finds them, `exact` compares numbers, `grade` decides."""

from .extract import extract_answer
from .grade import Grade, grade, grade_many

__all__ = ["Grade", "extract_answer", "grade", "grade_many"]
