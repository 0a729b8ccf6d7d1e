"""The processor runs in a process that has neither torch nor transformers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.processor_fixtures import gemma_directory

SCRIPT = """
import sys
from pathlib import Path
for name in ("torch", "transformers"):
    sys.modules[name] = None  # importing it now fails
from wicore_backend.processor.processor import Processor
prompt = Processor.from_checkpoint(Path(sys.argv[1])).process("Hello")
print(len(prompt))
"""


def test_neither_torch_nor_transformers_is_needed() -> None:
    root = Path(__file__).parent.parent
    command = [sys.executable, "-c", SCRIPT, str(gemma_directory())]
    finished = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert int(finished.stdout) > 0
