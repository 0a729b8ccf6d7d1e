#!/usr/bin/env python3
"""Stands in for tritonserver where only its life matters: answers health, has a stub process and a region in /dev/shm.

FAKE_SERVER changes it: "stubborn" ignores SIGTERM, and so does its stub; "broken" logs what a server logs whose model
fails to load, and ends; "busy" has an engine that drains in half a second, "endless" one that never does, "ill" one
that is not healthy; "worker" has a model without an engine, "stubborn worker" both.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

OPTIONS = dict(argument.removeprefix("--").split("=", 1) for argument in sys.argv[1:])
MODE = os.environ.get("FAKE_SERVER", "")


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        body = json.dumps({"name": OPTIONS["id"]}).encode() if self.path == "/v2" else b""
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_arguments):
        pass


def be_an_engine():
    presence = Path(os.environ["WICORE_RUN_DIRECTORY"], "engines", f"{STUB.pid}.json")
    presence.parent.mkdir()
    presence.write_text(json.dumps({"healthy": MODE != "ill", "reason": "no luck" if MODE == "ill" else ""}))
    asked = presence.parent.parent / "drain.json"
    while not asked.exists():
        time.sleep(0.02)
    print("asked to drain:", asked.read_text(), flush=True)
    time.sleep(600 if MODE == "endless" else 0.5)
    print("drained", flush=True)
    presence.unlink()


def stop(_number, _frame):
    print("told to stop", flush=True)
    STUB.terminate()
    REGION.unlink()
    os._exit(0)


if MODE == "broken":
    print(
        "E1121 09:37:15.932656 5460 model_lifecycle.cc:642] \"failed to load 'one' version 1: Internal: no such luck\""
    )
    print("error: creating server: Internal - failed to load all models")
    sys.exit(1)

prefix = OPTIONS["backend-config"].removeprefix("python,shm-region-prefix-name=")
REGION = Path("/dev/shm", f"{prefix}region")
REGION.write_bytes(b"0")
signal.signal(signal.SIGTERM, signal.SIG_IGN if "stubborn" in MODE else stop)
STUB = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
if MODE in ("busy", "endless", "ill"):
    threading.Thread(target=be_an_engine, daemon=True).start()
if "worker" in MODE:
    workers = Path(os.environ["WICORE_RUN_DIRECTORY"], "workers")
    workers.mkdir()
    (workers / f"{STUB.pid}.json").write_text("{}")
HTTPServer((OPTIONS["http-address"], int(OPTIONS["http-port"])), Handler).serve_forever()
