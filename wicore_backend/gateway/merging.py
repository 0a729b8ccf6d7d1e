"""Several streams as one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TypeVar

T = TypeVar("T")

_AHEAD = 4
"""Items that each stream may be ahead of the reader: a slow reader holds all of them up."""


async def merged(streams: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[tuple[int, T], None]:
    """The items of all streams as they come, each with its stream's place. The first error ends all of them, and so
    does closing this generator."""
    if len(streams) == 1:
        async with aclosing(streams[0]) as only:
            async for item in only:
                yield 0, item
        return
    items: asyncio.Queue[tuple[int, T] | BaseException | None] = asyncio.Queue(_AHEAD * len(streams))

    async def pump(place: int, stream: AsyncGenerator[T, None]) -> None:
        last: BaseException | None = None
        try:
            async with aclosing(stream):
                async for item in stream:
                    await items.put((place, item))
        except Exception as error:
            last = error
        await items.put(last)

    pumps = [asyncio.create_task(pump(place, stream)) for place, stream in enumerate(streams)]
    try:
        running = len(pumps)
        while running:
            found = await items.get()
            if isinstance(found, BaseException):
                raise found
            if found is None:
                running -= 1
            else:
                yield found
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
        for stream in streams:
            await stream.aclose()  # One whose task had not begun.
