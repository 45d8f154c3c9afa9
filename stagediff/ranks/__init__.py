"""Several processes of one machine on one step: a sharded step by shares of its shards, a training by slices of every batch or by features."""

from stagediff.ranks.launch import RANKS, SHARD, RankLostError, run, shard_here

__all__ = ["RANKS", "SHARD", "RankLostError", "run", "shard_here"]
