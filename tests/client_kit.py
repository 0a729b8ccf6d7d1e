"""What tests of the client share: an asynchronous client with a synchronous face, and scripts that do not end."""

from __future__ import annotations

import asyncio
import threading

from wicore_client import AsyncClient, RetryPolicy
from wicore_client.results import Response

QUICK = RetryPolicy(attempts=3, initial_delay=0.01, max_delay=0.5)


class Blocking:
    """An AsyncClient with Client's face, so that the same tests run on both."""

    def __init__(self, *args, **settings):
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self.client = AsyncClient(*args, **settings)

    def wait(self, awaitable):
        async def run():
            return await awaitable

        return asyncio.run_coroutine_threadsafe(run(), self.loop).result(20)

    def generate(self, *args, **options):
        return self.wait(self.client.generate(*args, **options))

    def health(self):
        return self.wait(self.client.health())

    def statistics(self):
        return self.wait(self.client.statistics())

    def cancel(self, request_id):
        async def cancel():
            return self.client.cancel(request_id)

        return self.wait(cancel())

    def stream(self, *args, **options):
        return BlockingStream(self, self.client.stream(*args, **options))

    def close(self):
        self.wait(self.client.close())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()


class BlockingStream:
    def __init__(self, owner, stream):
        self.owner, self.inner = owner, stream

    def __iter__(self):
        return self

    def __next__(self):
        try:
            return self.owner.wait(self.inner.__anext__())
        except StopAsyncIteration:
            raise StopIteration from None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.owner.wait(self.inner.aclose())

    def completion(self):
        return self.owner.wait(self.inner.completion())

    def cancel(self):
        self.owner.loop.call_soon_threadsafe(self.inner.cancel)

    @property
    def text(self):
        return self.inner.text


def never(request):
    """A script that says one word and then waits for the client to leave."""
    yield Response(text_output="one", token_ids=(1,))
    request.wait()


def silent(request):
    """A script that says nothing."""
    request.wait()
    yield from ()
