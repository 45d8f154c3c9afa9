"""Several processes of one machine on one step: a sharded step by shares of its shards, a training by slices of every batch."""

from stagediff.ranks.launch import RANKS, RankLostError, run

__all__ = ["RANKS", "RankLostError", "run"]
