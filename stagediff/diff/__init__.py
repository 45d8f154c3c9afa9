"""Stage-wise diffing: the plan of stages, rotations, cuts, the table of features."""
