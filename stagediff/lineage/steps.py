"""Registers the `both` kind of run."""

from stagediff.steps import RunKind, register_kind

register_kind(RunKind("both", "stagediff.lineage.config:BothConfig", "stagediff.lineage.stages:plan"))
