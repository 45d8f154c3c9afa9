"""What a run is made on: models, corpora, token rows and budgets, from a config's groups to specs. Every kind of run plans its inputs here."""
