"""The paper: torch and the standard library, nothing else."""
