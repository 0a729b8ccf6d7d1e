"""The NVMe store: a bounded tier of opaque records on a disk, which survives restarts and never gives a wrong byte.

It knows names and bytes, nothing of models. Records of any lengths share one capacity, so that no split between layer
groups has to be guessed. What it promises:

1. **Who may read when.** A record can be fetched from the moment its store is done, and until it is deleted; in
   between, the same name cannot be stored again (`HELD`). A fetched buffer is right exactly if its outcome is `DONE`:
   the payload has the checksum that it was stored with, the same name and the same length. Otherwise the buffer
   holds nothing to be used.
2. **Whose memory.** A payload is the store's to read, and a buffer the store's to fill, until the ticket is done. Every
   ticket gets done, once, whatever the disk does: by the deadlines of the configuration for each record, or sooner by
   the caller's.
3. **What a cancel cuts.** Each record on its own. Waiting or in the kernel, it ends at once as `CANCELLED`; the copy
   into the caller's buffer (memory only, after the checksum) and a write that is done are past cancelling and end as
   `DONE`. A thread that is still in the kernel keeps its slots from others until it comes back.
4. **Who decides.** The store never picks a victim. Full, it says `FULL`; the caller deletes and asks again. The slots
   of a deleted record that is still being read are free when that read is over.
5. **Bound.** The files, in whole pages, never exceed `capacity_bytes`, headers included; unless told otherwise the
   space is taken when the store is made.
6. **Crash.** At any byte, of any write, in any order in which the disk may carry them out: each record is found whole
   or not at all. Nothing is replayed and no order of writes is relied on: a record exists if all of its headers do and
   its payload has its checksum.
7. **Restart.** Opening reads the headers alone, 128 bytes a slot in one piece, and gives the records back in the order
   in which they were stored. Records of another fingerprint do not exist, and are erased. A deletion may be undone by a
   crash, with the bytes that were stored under that name, unless `flush` or `close` came between; power lost without
   `flush` can cost the latest records.
8. **One process.** A second one is refused with `StoreInUseError`, which names the directory.
9. **Trouble.** A full disk, errors, lost permissions, a slow or silent disk, deleted files: outcomes and counters, one
   log line for each kind, never an exception after opening. After a failed write, stores are refused for `retry_s`.
   Where the disk reported an error, the slots are not used again before the next opening. While every reading (writing)
   thread is past its deadline, fetches (stores) end as `LATE` at once.
10. **Threads.** Every method may be called on any thread. `store`, `fetch`, `delete` and the rest never touch the disk
    on the caller's; `flush` and `close` do.

Modules: `store` (the interface), `opening` (what is found on the disk), `mover` (what threads do to the files), `jobs`
(a record under way), `lane` (threads and deadlines), `ledger` (the books as threads share them), `index` (the books),
`transfer` (several records in few I/Os), `config`, `files` (the disk), `record` (headers), `space` (free slots),
`tickets`, `statistics`, `trouble`, `outcome`. Each imports from those after it only.
"""

from wicore_backend.hmt.nvme.config import NvmeConfig
from wicore_backend.hmt.nvme.files import StoreFiles, StoreInUseError, StoreUnusableError
from wicore_backend.hmt.nvme.index import StoreAccountingError
from wicore_backend.hmt.nvme.outcome import Outcome
from wicore_backend.hmt.nvme.statistics import HeldRecord, NvmeStatistics
from wicore_backend.hmt.nvme.store import NvmeStore
from wicore_backend.hmt.nvme.tickets import Ticket
from wicore_backend.hmt.nvme.trouble import Trouble

__all__ = [
    "HeldRecord",
    "NvmeConfig",
    "NvmeStatistics",
    "NvmeStore",
    "Outcome",
    "StoreAccountingError",
    "StoreFiles",
    "StoreInUseError",
    "StoreUnusableError",
    "Ticket",
    "Trouble",
]
