"""Where notebooks are executed: one by papermill, many on this machine, on a Ray cluster, or by Slurm."""
