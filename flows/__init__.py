"""Prefect flows: the order of the steps. No maths and no I/O of their own."""
