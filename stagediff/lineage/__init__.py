"""Both methods on one dictionary lineage: a training run is tracked up to its last checkpoint, and the diff goes on from there."""
