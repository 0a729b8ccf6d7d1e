"""What `scripts.gpu_report` measures on a card: the parts, their goals, and how they are run."""
