"""Prefect tasks: one per step, each calls one function of the library."""
