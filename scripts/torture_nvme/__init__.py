"""How the NVMe store is tried: killed, cut off, damaged, timed. `python -m scripts.torture_nvme` says what there is."""
