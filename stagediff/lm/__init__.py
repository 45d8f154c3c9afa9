"""Language models under study: loading, hook points, corpora and token rows, harvesting, activation data."""
