"""Runs: a demonstration, a distillation, a comparison, explanations and concepts of a data set."""

# Now and not when they are asked for: functions and modules share names here, and a module that is
# imported later takes the place of the function. What is heavy is imported when they are called.
from fastxkd.runs.dissect import dissect
from fastxkd.runs.explain import explain
from fastxkd.runs.export import export
from fastxkd.runs.reader import open
from fastxkd.runs.verify import verify

__all__ = ["dissect", "explain", "export", "open", "verify"]
