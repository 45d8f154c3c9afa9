"""Is a found feature real: labels, activation distributions, steering, ablation, rivals, and one verdict per named feature."""
