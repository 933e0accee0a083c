"""The search of a run for blocks that keep softmax attention: between its Stages 1 and 2, or by a command."""

from adala.search.run import Search, search_run

__all__ = ["Search", "search_run"]
