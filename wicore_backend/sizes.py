"""Sizes in bytes, as people read them."""

_UNITS = ((10**9, "GB", 2), (10**6, "MB", 0), (10**3, "kB", 0), (1, "bytes", 0))


def disk_size(size: float) -> str:
    """Of files and disks, in powers of 1000: "17.02 GB", "35 MB", "512 bytes"."""
    one, name, digits = next((unit for unit in _UNITS if size >= unit[0]), _UNITS[-1])
    return f"{size / one:,.{digits}f} {name}"


def gib(size: float) -> str:
    """Of memory: "3.4", for a line or a column that says GiB."""
    return f"{size / 2**30:.1f}"
