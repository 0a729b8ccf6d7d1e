"""The OpenAI Triton kernels of paged attention. Importing a module of this package imports `triton`."""
