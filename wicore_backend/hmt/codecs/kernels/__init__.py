"""The codecs in OpenAI Triton: one launch each way, which reads the blocks once and writes the records once, or back.

What they compute, the classes of the same names in the package above say in PyTorch, and the bytes are theirs (q4: but
for codes between which there is nothing to choose, see `q4`). They take their place on CUDA devices, for shapes that
their `for_blocks` does not decline. Nothing is allocated, nothing waits for the device. Records may lie in page-locked
memory of the host, where they are written and read over the bus. Blocks may be any of a pool's, named by an index.

`arithmetic` holds what must not depend on how a compiler sees it; all kernels are launched with `enable_fp_fusion` off,
so that a multiplication and an addition are rounded apart, as PyTorch rounds them.

Importing a module of this package imports triton; nothing else does. They are imported when a block on a CUDA device
comes, or by a test.
"""
