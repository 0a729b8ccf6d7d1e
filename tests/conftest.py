"""What all tests share: where kernels run.

OpenAI Triton reads TRITON_INTERPRET when it decorates a kernel, its own library's included when it is imported: so the
variable is set here, before any test imports it, and holds for the whole session. Nothing but kernels notices.
"""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
# As `wicore_backend.executor` has it, which tests that compute by ONNX Runtime themselves may import later.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


@pytest.fixture(scope="session")
def kernel_device():
    """Where kernels in OpenAI Triton run: on the GPU if there is one, else on the CPU, under the interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
