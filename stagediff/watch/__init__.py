"""Checkpoints as they appear: finds complete ones and says which runs they are due."""
