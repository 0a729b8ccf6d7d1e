"""Paged attention on CUDA: OpenAI Triton kernels that read the pools in place (`paged.py`)."""
