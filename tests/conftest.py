"""What all tests share: where kernels run, and numbers that are the same in each run.

OpenAI Triton reads TRITON_INTERPRET when it decorates a kernel, its own library's included when it is imported: so the
variable is set here, before any test imports it, and holds for the whole session. Nothing but kernels notices.
"""

import os
import random

import numpy as np
import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
# As `wicore_backend.executor` has it, which tests that compute by ONNX Runtime themselves may import later.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
# Examples are the same in each run, and none has a time limit: a busy machine is no fault. To look for others:
# pytest --hypothesis-profile=default
settings.load_profile("ci")


@pytest.fixture(scope="session")
def kernel_device():
    """Where kernels in OpenAI Triton run: on the GPU if there is one, else on the CPU, under the interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _same_numbers():
    """What a test draws without a seed of its own, so that one that fails does so again."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def one_thread():
    """PyTorch computes on one thread, and on as many as before afterwards."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
