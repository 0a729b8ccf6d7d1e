"""The cold tier: between the host tier's slots and the NVMe store. Blocks go down encoded and come up decoded.

The *loop thread* is the one that makes the calls, owns the slots' books and must not wait. What this package promises:

1. **Which thread.** `spill`, `restore`, `Restore.cancel`, `finished`, `check_integrity` and `close` are the loop
   thread's. `holds`, `observe`, `attend`, `statistics` and `restore_seconds` may be called on any. Only `close` waits.
   What is observed the policy hears of on the spilling thread, in parts of a millisecond. `woken` is called on any
   thread, and must not wait either.
2. **Who reads or writes a slot when.** A slot is the tier's from the call that names it until `finished` has reported
   its block: a spilled one is read (before that others may read it too, but nobody may write to it), a restored one is
   written to (nobody else may read it). Reported, it is the caller's, and is touched no more. A slot has at most one
   block under way; a second one is the caller's mistake and raises ValueError, with nothing taken.
3. **What comes before.** `after` is called on the direction's thread before any slot of the call is read or written to:
   there a GPU's copies into the slots, and out of them, are waited for. Until it returns, later calls of that direction
   wait; those of the other do not.
4. **What a name stands for.** One name, one content. So a spill of a block that is held, or on its way, needs no work
   and is reported as `HELD` at once. A block can be restored from the moment `holds` says so: when its store is done,
   and not when it is spilled.
5. **What is reported.** Every block that was taken is reported once, whatever happens to it. A restored slot holds its
   block exactly if the outcome is `DONE`: the bytes have their checksum, and were decoded after that. With any other
   outcome the block is a miss, and the slot's bytes are of no use, perhaps overwritten.
6. **What a cancel cuts.** All blocks of a restore that are not being decoded yet. They end without waiting for the disk
   and are reported as `CANCELLED`; until they are, their slots are still the tier's (2). The record stays. Spills are
   not cancelled.
7. **Deadlines.** A block that is not read `deadline_s` after the call is `LATE`, whatever it waited for; to be told
   takes one batch's decoding longer. Without a deadline the store's own ones hold. Restores and spills have a thread
   and a tray of memory each, so that neither waits in the other's queue.
8. **Bounds.** `spill` takes blocks from the front as long as fewer than `backlog_bytes` are under way, and leaves the
   rest to the caller: a slow disk makes spills fewer, not memory larger. Memory is that of the trays. The disk's bound
   is the store's: when it says `FULL`, the policy's victims are deleted until the record fits. A record that is being
   restored is never a victim.
9. **Crash.** Costs what was under way, and if power fails the latest records. Another opening finds every other record,
   in the order of storing, if fingerprint, codecs and shapes are the same.
10. **Trouble.** A full or failing disk, lost permissions, deleted files: spills end as `FAILED`, `REFUSED` or `LATE`,
    restores as misses, each counted; the store logs one line for each kind. Nothing raises on the loop thread, nothing
    stalls it. A damaged record is a miss once and then gone. A slow disk raises `restore_seconds`, by which the caller
    computes instead; the tier goes on to measure by itself, so that it is asked again once it is well. A bug costs the
    blocks of the batch that it met, which are reported as `FAILED`, and a policy that raises its place: LRU takes it.

Modules: `tier` (the interface), `spill_worker` and `restore_worker` (the two threads), `worker` (what they have in
common), `decoders` (threads that decode for the second), `batches` (what shares a tray), `staging` (slots to records
and back), `threads` (how they compute), `books` (what is held), `pace` (how long transfers take), `requests` (what is
asked and reported), `records` (names on the disk, and the store's shape), `statistics`. Each imports from those after
it only.
"""

from wicore_backend.hmt.cold_tier.books import ColdAccountingError
from wicore_backend.hmt.cold_tier.records import store_config
from wicore_backend.hmt.cold_tier.requests import Finished, Restore
from wicore_backend.hmt.cold_tier.statistics import ColdCounts, ColdStatistics
from wicore_backend.hmt.cold_tier.tier import ColdTier, ColdTierLimits

__all__ = [
    "ColdAccountingError",
    "ColdCounts",
    "ColdStatistics",
    "ColdTier",
    "ColdTierLimits",
    "Finished",
    "Restore",
    "store_config",
]
