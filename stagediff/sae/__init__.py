"""Sparse dictionaries (SAEs): architectures, training, metrics, statistics, formats of other libraries."""
