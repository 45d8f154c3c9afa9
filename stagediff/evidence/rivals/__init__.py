"""What the double path must beat, on the same rows and with the same budget: crosscoders of the two models, an SAE on their difference; and one table."""
