"""`python -m wicore_backend.gateway --set NAME=VALUE`: the gateway as a process."""

from __future__ import annotations

import sys

from wicore_backend.gateway.server import main

sys.exit(main(sys.argv[1:]))
