"""Random bit flips, truncations, misplaced and torn writes, read back."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from scripts.torture_nvme.records import NAME_BYTES, SIZES, SLOT, content_of, fetch_all, shape
from wicore_backend.hmt.nvme import NvmeStore, Outcome, StoreUnusableError
from wicore_backend.hmt.nvme.record import HEADER_BYTES, fingerprint_of, scan


@dataclass
class DamageReport:
    """What `damage_rounds` saw.

    Attributes
    ----------
    rounds
        By kind of damage.
    read, refused
        Records asked for; those of them that were not served.
    wrong
        Records served with a wrong byte. The promise is none.
    collateral
        Records not served although no byte of theirs was damaged. The promise is none.
    unopened
        Damaged stores that could not be opened. The promise is none.
    """

    rounds: dict[str, int] = field(default_factory=dict)
    read: int = 0
    refused: int = 0
    wrong: int = 0
    collateral: int = 0
    unopened: int = 0

    @property
    def broken(self) -> bool:
        return bool(self.wrong or self.collateral or self.unopened)


class _Victim:
    """A store's files as they were, and who has which slot."""

    def __init__(self, directory: Path, rng: np.random.Generator) -> None:
        self.config = shape(directory, 1 << 20)
        shutil.rmtree(directory, ignore_errors=True)
        with NvmeStore(self.config) as store:
            while store.store(name := rng.bytes(NAME_BYTES), content_of(name)).outcomes[0] is not Outcome.FULL:
                pass
        with NvmeStore(self.config) as store:
            names = [record.name for record in store.records()]
            for name in names[::5]:  # So that later records lie in pieces.
                store.delete(name)
            for _ in range(200):
                store.store(name := rng.bytes(NAME_BYTES), content_of(name)).wait()
        with NvmeStore(self.config) as store:
            self.names = [record.name for record in store.records()]
        self.content = {name: content_of(name) for name in self.names}
        self.files = {"index": HEADER_BYTES, "slots": SLOT}
        self.bytes = {file: (directory / file).read_bytes() for file in self.files}
        found = scan(
            [self.bytes["index"]],
            fingerprint=fingerprint_of(self.config.fingerprint, slot_bytes=SLOT),
            slot_bytes=SLOT,
            max_payload_bytes=max(SIZES),
        )
        runs = [(record.name, run) for record in found.records for run in record.runs]
        self.owner = {slot: name for name, run in runs for slot in range(run.start, run.stop)}

    def put_back(self) -> None:
        for file, content in self.bytes.items():
            path = self.config.directory / file
            if path.read_bytes() != content:
                with path.open("r+b") as stream:
                    stream.write(content)
                    stream.truncate()

    def damage(self, kind: str, rng: np.random.Generator) -> set[bytes]:
        """Do it; the names of records that may now be gone."""
        file = str(rng.choice(list(self.files)))
        unit, size = self.files[file], len(self.bytes[file])
        damaged: list[tuple[int, int]] = []
        with (self.config.directory / file).open("r+b", buffering=0) as stream:

            def write(at: int, content: bytes) -> None:
                stream.seek(at)
                stream.write(content)
                damaged.append((at, at + len(content)))

            match kind:
                case "flip":
                    for bit in rng.integers(size * 8, size=int(rng.integers(1, 9))).tolist():
                        before = self.bytes[file][bit // 8]
                        write(bit // 8, bytes([before ^ 1 << bit % 8]))
                case "truncation":
                    stream.truncate(at := int(rng.integers(size)))
                    damaged.append((at, size))
                case "zeros" | "noise":
                    at = int(rng.integers(size))
                    length = int(min(size - at, rng.integers(1, 4 * unit)))
                    write(at, bytes(length) if kind == "zeros" else rng.bytes(length))
                case _:  # A write that went to another unit's place.
                    source, target = (int(place) * unit for place in rng.integers(size // unit, size=2))
                    write(target, self.bytes[file][source : source + unit])
        slots = {slot for start, stop in damaged for slot in range(start // unit, -(-stop // unit))}
        return {self.owner[slot] for slot in slots if slot in self.owner}


def damage_rounds(directory: Path, *, rounds: int, seed: int) -> DamageReport:
    """Damage a good store before it is opened or while it is open, and read every record."""
    rng = np.random.default_rng(seed)
    victim = _Victim(directory, rng)
    report = DamageReport()
    kinds = {"flip": 0.6, "truncation": 0.25, "zeros": 0.05, "noise": 0.05, "misplaced": 0.05}
    for _ in range(rounds):
        kind = str(rng.choice(list(kinds), p=list(kinds.values())))
        report.rounds[kind] = report.rounds.get(kind, 0) + 1
        victim.put_back()
        live = rng.random() < 0.5
        hurt = set() if live else victim.damage(kind, rng)
        try:
            store = NvmeStore(victim.config)
        except StoreUnusableError:
            report.unopened += 1
            continue
        with store:
            if live:
                hurt = victim.damage(kind, rng)
            for name, (outcome, buffer) in fetch_all(store, victim.names).items():
                report.read += 1
                report.refused += outcome is not Outcome.DONE
                report.wrong += outcome is Outcome.DONE and buffer != victim.content[name]
                report.collateral += outcome is not Outcome.DONE and name not in hurt
            store.check_integrity()
    return report
