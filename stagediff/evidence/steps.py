"""Registers the evidence steps and the settings that add them to a run."""
