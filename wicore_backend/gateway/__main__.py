"""`python -m wicore_backend.gateway --set NAME=VALUE`: the gateway as a process."""

from __future__ import annotations

import os
import sys

# gRPC reads sockets on threads of its own, and hands each message on from thread to thread. Its older way, in which the
# thread that waits for messages reads the socket itself, takes a third less CPU for each of them
# (docs/benchmarks/gateway.md). gRPC looks at this when it is imported; a version that does not know it any more says so
# and goes on.
os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_client")

from wicore_backend.gateway.server import main

sys.exit(main(sys.argv[1:]))
