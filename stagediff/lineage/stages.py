"""The plan of a run of both methods: the chain's steps, then the diff's, which go on from the chain's last model and dictionary."""

from stagediff.diff.stages import add_stages
from stagediff.lineage.config import BothConfig
from stagediff.plan import Plan
from stagediff.store import Store
from stagediff.track.chain import add_chain

__all__ = ["plan"]


def plan(config: BothConfig, store: Store) -> Plan:
    """All steps of the run. S settles: it is the chain's last dictionary trained on, at a constant sparsity weight, with the `train` budget."""
    result = Plan(config.name or config.kind)
    chain = add_chain(config.track, result)
    add_stages(config.stagewise, result, base=chain.model, settle=chain.dictionary)
    return result
