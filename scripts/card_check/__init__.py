"""How `scripts/verify_gpu.sh` works: what has to be there, what is compared, what is timed, the table."""
