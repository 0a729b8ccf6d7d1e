"""Set up, start, supervise and stop a real tritonserver. Standard library only, so that it runs on a bare machine.

`installation` makes the environment and fetches the server, `server` starts it and waits until it answers, `guard` is
the small process that ends it whatever happens, `runs` keeps the books that say what belongs to which start, and
`cli` is what scripts/serve.sh and scripts/test.sh run.
"""

from scripts.serving.installation import Installation
from scripts.serving.server import ServerOptions, ServerStartError, TritonServer, Urls

__all__ = ["Installation", "ServerOptions", "ServerStartError", "TritonServer", "Urls"]
