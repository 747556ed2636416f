"""Seeded fuzzing of all that reads what others wrote: ``python -m tests.fuzz [--minutes N] [--target NAME]``."""

from tests.fuzz.run import TARGETS, Finding, case, fuzz

__all__ = ["TARGETS", "Finding", "case", "fuzz"]
