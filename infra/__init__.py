"""Where the pipeline runs: work pools, the Slurm launcher, the server. Imports neither the library nor Prefect; commands are in README.md."""
