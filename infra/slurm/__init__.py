"""Slurm under Prefect: one flow run is one Slurm job."""
