"""Registers the `watch` settings of tracked and of stage-wise runs. They add no step: what is found becomes part of the configs that are run."""

from stagediff.steps import Extension, register_extension

for kind in ("track", "stagewise"):
    register_extension(Extension(kind, "watch", "stagediff.watch.config:WatchConfig", "stagediff.watch.config:add_nothing"))
