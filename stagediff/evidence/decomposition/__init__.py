"""Which part of a feature's turning which step made: the scatter's groups followed along one path at a time (P1, "Decomposition")."""
