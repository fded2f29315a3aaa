"""Starting stages: processes on this machine, or Slurm jobs."""
