"""The repository's own models start, answer, stop amid work, and leave nothing behind, again and again."""

import pytest
from wicore_client import Cancelled

from scripts.serving import ServerOptions, TritonServer
from scripts.serving.installation import ROOT
from tests.integration.conftest import FREE_PORTS
from tests.integration.test_server_lifecycle import is_clean
from tests.integration.wire import client


def test_five_starts_and_stops_with_the_real_models(installation, tmp_path):
    settings = {"model": str(ROOT / "models" / "wicore-demo"), "device": "cpu"}
    for round_ in range(5):
        options = ServerOptions(settings=settings, drain_seconds=1.0, **FREE_PORTS)
        with TritonServer(options, installation, state=tmp_path / "state") as server:
            with client(server, retry=None) as c:
                assert c.generate("What is 12 + 7?", temperature=0.0, max_tokens=10).text == "19"
                if round_ % 2:
                    # A stop while answers grow: each gets its end.
                    streams = [c.stream("hello", max_tokens=9000, ignore_eos=True) for _ in range(4)]
                    for stream in streams:
                        next(stream)
                    server.stop()
                    for stream in streams:
                        with pytest.raises(Cancelled, match="shutting down"):
                            list(stream)
            server.stop()
            assert is_clean(server.run)
