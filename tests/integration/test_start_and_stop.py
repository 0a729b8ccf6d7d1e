"""The repository's own models start, answer, stop amid work, and leave nothing behind, again and again."""

import pytest

from scripts.serving import ServerOptions, TritonServer
from scripts.serving.installation import ROOT
from tests.integration.conftest import FREE_PORTS
from tests.integration.test_server_lifecycle import is_clean
from tests.integration.wire import client


def test_five_starts_and_stops_with_the_real_models(installation, tmp_path):
    settings = {"model": str(ROOT / "models" / "wicore-demo"), "device": "cpu"}
    for round_ in range(5):
        options = ServerOptions(settings=settings, **FREE_PORTS)
        with TritonServer(options, installation, state=tmp_path / "state") as server:
            with client(server, retry=None) as c:
                assert c.generate("What is 12 + 7?", temperature=0.0, max_tokens=10).text == "19"
                if round_ % 2:
                    # A stop while answers grow: their clients leave with the server.
                    streams = [c.stream("hello", max_tokens=9000, ignore_eos=True) for _ in range(4)]
                    for stream in streams:
                        next(stream)
                    server.stop()
                    for stream in streams:
                        with pytest.raises(Exception, match=r"\w"):
                            list(stream)
            server.stop()
            assert is_clean(server.run)
