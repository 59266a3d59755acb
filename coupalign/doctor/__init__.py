"""What this machine, this installation and this job can do."""
