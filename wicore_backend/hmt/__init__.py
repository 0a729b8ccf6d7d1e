"""HMT, hierarchical memory tiers: the KV cache over the device's memory, host memory and a disk.

The life of a block
===================

A block has the keys and values of `block_size` tokens, in all layers of its group (`layout`). Once it is full nobody
writes to it any more, and it has a *name* (`names`): a hash over all that its bytes depend on. One name, one content;
so a block is the same one wherever it lies, and may lie in several places at once.

In each place it is in one state, which the docstring of the class there defines and its `check_integrity` proves:

- on the device, a block of a pool (`block_pool.BlockPool`): *free*, *active*, *cached*;
- in host memory, a slot (`host_tier.HostTier`): *free*, *held*, *pinned*, *leaving*, *stored*, *copied*,
  *arriving*;
- for the cold tier, a block (`cold_tier.books.ColdBooks`): *unknown*, *spilling*, *held*, *pinned*;
- on the disk, slots of a file (`nvme.index.Index`): *free*, *arriving*, *held*, *leaving*, *retired*.

What happens to it, and who decides:

1. A sequence takes it: free -> active (`blocks.BlockManager.extend`). The step that is computed next fills it.
2. It is noted under its name (`prefixes.Prefixes.note`), and stays active. From now on other sequences find it, and use
   it beside the first (`BlockManager.open`, `fork`).
3. The last sequence that uses it lets go: active -> cached. Opened on again, it is active again.
4. The device needs room, or has time: what the policy would miss least is given up (`victims`), cached -> free, and
   spilled on the way: in host memory free -> held (`exchange.Exchange.spilling`). Blocks of a window go together, even
   one that is still in use (`window_pool`).
5. Host memory fills: what its policy would miss least leaves for the disk (`lower_tiers.LowerTiers.submit`), held ->
   leaving, in the cold tier unknown -> spilling, on the disk free -> arriving. Once it is held there, its slot in host
   memory is as good as free, and keeps it until another block needs a slot: stored. An idle engine stores what it
   holds in both places (`write_behind`): held -> copied -> held.
6. The disk fills: what the cold tier's policy would miss least is deleted, held -> unknown, and has left the cache.
7. A prompt comes that goes on from it. In host memory: held -> pinned, until a free block of the device is active with
   its bytes (`exchange.Exchange.load`). On the disk: pinned there, and a slot arriving for it in host memory
   (`LowerTiers.restore`), where it is then pinned for the sequence that waits.
8. Something is wrong with it: a checksum, the disk, a deadline, a cancel. It is unknown, or stays where it was, and
   whoever waited computes it again. Never is it another block's bytes.

What is copied when is in `transfers` (device and host memory, in the order of the decisions) and in `cold_tier` (host
memory and disk, beside the steps). Who decides what is given up is in `policy`.

`BlockManager.check_integrity` proves the states of the first two places, and that each follows from the sequences that
are open and the restores that are under way; `ColdTier.check_integrity` those of the other two.
"""
