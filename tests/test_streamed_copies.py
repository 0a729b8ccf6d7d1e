"""Copies on streams of their own give what copies in order give, whichever stream is quick or slow."""

import random

import pytest
import torch

from tests.copy_interleavings import (
    BLOCKS,
    EDGES,
    LAYOUT,
    SLOTS,
    G,
    L,
    SimulatedStreams,
    Story,
    copies_over,
    obey_all_but,
)
from wicore_backend.hmt.codecs import make_codec
from wicore_backend.hmt.layout import KVLayout, Part
from wicore_backend.hmt.row_copies import copy_rows, copy_rows_plainly
from wicore_backend.hmt.streamed_copies import StreamedCopies
from wicore_backend.hmt.streams import Stream
from wicore_backend.hmt.transfers import Route, Transfer, in_rounds

DOWN, WITHIN, UP = Route.DEVICE_TO_HOST, Route.WITHIN_DEVICE, Route.HOST_TO_DEVICE


def tell(seed: int, *, codec="exact", parts=True, broken=None, length=40) -> None:
    """A story of so many events on simulated streams, of which one may not wait as it should."""
    rng = random.Random(seed)
    streams = SimulatedStreams(rng, obey_all_but(broken))
    torch.manual_seed(seed)
    pools = {group: torch.randn(BLOCKS, *LAYOUT.block_shape(group)) for group in (G, L)}
    codecs = {group: make_codec(codec, LAYOUT.block_shape(group), torch.float32) for group in (G, L)}
    records = {group: codecs[group].encode(torch.randn(SLOTS, *LAYOUT.block_shape(group))) for group in (G, L)}
    copies, slots, codecs = copies_over(
        rng, pools, records, codecs, streams=streams, copy_rows=copy_rows_plainly, parts=parts
    )
    story = Story(rng, pools, slots, codecs, copies, lambda work: streams.run(Stream.STEP, work))
    for _ in range(length):
        story.go_on()
        for _ in range(rng.randrange(8)):
            streams.advance()
    while streams.advance():
        pass
    story.compare()


@pytest.mark.parametrize("codec", ["exact", "q8"])
@pytest.mark.parametrize("parts", [True, False])
def test_whichever_stream_is_quick_the_bytes_are_those_of_copies_in_order(codec, parts):
    for seed in range(25):
        tell(seed, codec=codec, parts=parts)


@pytest.mark.parametrize("edge", EDGES, ids=lambda edge: f"{edge[0].name}-waits-for-{edge[1].name}")
def test_no_stream_waits_in_vain(edge):
    """Without any one of the waits, bytes are wrong sooner or later; so the test above would see it missing."""

    def tell_many() -> None:
        for seed in range(200):
            tell(seed, broken=edge)

    with pytest.raises(AssertionError, match=r"layer|slot|blocks"):
        tell_many()


@pytest.mark.parametrize("kept", ["trays", "slots"])
def test_both_waits_for_what_is_spilled_are_needed(monkeypatch, kept):
    """That of spills for an empty tray, and that of loads for a full slot: one of them stays."""

    def load_after(self, number: int) -> None:
        if kept == "slots" and number:
            self._streams.wait_indeed(Stream.SWAP, self._draining[-1][1])

    def tell_many() -> None:
        for seed in range(200):
            tell(seed, broken=(Stream.SWAP, Stream.DRAIN) if kept == "slots" else None)

    monkeypatch.setattr(StreamedCopies, "_load_after", load_after)
    with pytest.raises(AssertionError, match=r"layer|slot|blocks"):
        tell_many()


def test_a_layer_waits_for_its_own_part_and_no_later_one():
    rng = random.Random(0)
    streams = SimulatedStreams(rng)
    pools = {group: torch.zeros(BLOCKS, *LAYOUT.block_shape(group)) for group in (G, L)}
    records = {group: torch.zeros(SLOTS, LAYOUT.block_bytes(group), dtype=torch.uint8) for group in (G, L)}
    copies = StreamedCopies(
        LAYOUT, pools, records, {}, streams=streams, copy_rows=copy_rows_plainly, staging_bytes=0, large_bytes=0
    )
    copies.apply([Transfer(UP, G, 1, 1), Transfer(UP, L, 1, 1)])
    waited = []
    for layer in range(len(LAYOUT.layers)):
        copies.wait(layer)
        waited.append(sum(len(queue) for stream, queue in streams._queues.items() if stream is Stream.STEP))
    assert waited == [1, 1, 2, 3, 4, 4]


def test_parts_follow_the_layers_and_change_with_the_group():
    assert LAYOUT.parts == (
        Part(0, {L: range(2)}),
        Part(2, {G: range(1)}),
        Part(3, {L: range(2, 3)}),
        Part(4, {G: range(1, 3)}),
    )
    uniform = KVLayout.of([G] * 20, block_size=2, kv_heads=1, head_dim=2, window=8, bytes_per_value=4)
    assert [(part.first_layer, len(part.spans[G])) for part in uniform.parts] == [(0, 8), (8, 8), (16, 4)]


def test_a_room_that_changes_hands_within_a_list_takes_a_round_for_each_owner():
    swap = [Transfer(DOWN, G, 1, 1), Transfer(UP, G, 5, 1), Transfer(DOWN, G, 2, 2), Transfer(UP, G, 6, 2)]
    (only,) = in_rounds(swap)[G]
    assert (only.spills.sources, only.spills.targets) == ([1, 2], [1, 2])
    assert (only.loads.sources, only.loads.targets) == ([5, 6], [1, 2])
    reused_slot = [Transfer(UP, G, 5, 1), Transfer(DOWN, G, 2, 5)]
    reused_block = [Transfer(UP, G, 5, 1), Transfer(DOWN, G, 1, 6)]
    forked_on = [Transfer(WITHIN, G, 1, 2), Transfer(WITHIN, G, 2, 3)]
    for transfers in (reused_slot, reused_block, forked_on):
        assert len(in_rounds(transfers)[G]) == 2
    assert len(in_rounds([Transfer(DOWN, G, 1, 1), Transfer(UP, L, 5, 1)])) == 2


@pytest.mark.parametrize("width", [1, 24, 5000])
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8])
def test_the_kernel_copies_the_rows_that_its_plain_twin_copies(kernel_device, width, dtype):
    torch.manual_seed(width)
    source = torch.randint(0, 250, (7, 2 * width + 3), device=kernel_device).to(dtype)[:, 1 : width + 1]
    sources, targets = (torch.tensor(rows, device=kernel_device) for rows in ([6, 0, 3, 3], [1, 8, 0, 4]))
    for from_, to in ((None, None), (sources, None), (None, targets), (sources, targets)):
        expected = torch.zeros(9, width + 5, dtype=dtype, device=kernel_device)
        copied = expected.clone()
        copy_rows_plainly(source, expected[:, 2 : width + 2], 4, sources=from_, targets=to)
        copy_rows(source, copied[:, 2 : width + 2], 4, sources=from_, targets=to)
        assert torch.equal(copied, expected)
    untouched = torch.zeros(9, width, dtype=dtype, device=kernel_device)
    copy_rows(source, untouched, 0, sources=sources)
    assert not untouched.any()
