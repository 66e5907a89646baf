"""``fastxkd reproduce``: the papers' claims, trained and measured on real images."""

from fastxkd.runs.reproduce.run import STUDIES, reproduce

__all__ = ["STUDIES", "reproduce"]
