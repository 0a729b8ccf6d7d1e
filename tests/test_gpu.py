"""The engine on a CUDA device: the answers of the CPU in float32, also where blocks come and go between the tiers."""

import random
from pathlib import Path

import pytest
import torch

from tests.copy_interleavings import BLOCKS, EDGES, LAYOUT, SLOTS, G, L, Story, copies_over, obey_all_but
from wicore_backend import Engine, EngineConfig, SamplingParams
from wicore_backend.engine.logprobs import logprobs_of
from wicore_backend.engine.sampler import SamplingRow, sample
from wicore_backend.hmt.codecs import make_codec
from wicore_backend.hmt.host_memory import HostMemory
from wicore_backend.hmt.row_copies import copy_rows
from wicore_backend.hmt.streamed_copies import StreamedCopies
from wicore_backend.hmt.streams import CudaStreams, Stream

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and this machine has none"),
]

ROOT = Path(__file__).resolve().parent.parent
PICTURE = (ROOT / "client" / "wicore_client" / "assets" / "shapes.png").read_bytes()
KV_BYTES = 2 * 2**30  # Other tests, and other engines, may be on the same card.
FACTS = " ".join(f"The code of box {n} is {n * 37 % 1000}." for n in range(300))
PROMPTS: list[tuple[str, list[bytes]]] = [
    ("Describe this picture.", [PICTURE]),
    ("描述这张图片", [PICTURE]),
    ("How many things are there?", [PICTURE]),
    ("What colour is the circle?", [PICTURE]),
    *[(f"What is {a} + {a * 3 % 20}?", []) for a in range(20)],
    *[(f"Reverse: {word}", []) for word in ("apple", "river", "stone", "cloud", "green", "table")],
    (f"{FACTS} What is the code of box 123?", []),
]


def answers(device, dtype):
    settings = EngineConfig(model=ROOT / "models" / "wicore-demo", device=device, dtype=dtype, kv_cache_bytes=KV_BYTES)
    with Engine(settings) as engine:
        params = SamplingParams(max_tokens=40, temperature=0.0)
        prompts, images = [p for p, _ in PROMPTS], [i for _, i in PROMPTS]
        results = engine.generate(prompts, params, images=images)
        engine._model.blocks.check_integrity()
        return [result.token_ids for result in results]


@pytest.fixture(scope="module")
def on_cpu():
    return answers("cpu", "float32")


def test_float32_gives_the_tokens_of_the_cpu(on_cpu):
    assert answers("cuda", "float32") == on_cpu


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
def test_the_second_gpu_gives_them_too(on_cpu):
    assert answers("cuda:1", "float32") == on_cpu


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_gives_nearly_all_of_them(on_cpu, dtype):
    same = sum(a == b for a, b in zip(answers("cuda", dtype), on_cpu, strict=True))
    assert same >= 0.9 * len(PROMPTS)


@torch.inference_mode()
def test_sampling_does_not_wait_for_the_device():
    logits = torch.randn(4, 1000, device="cuda")
    penalties = {"repetition_penalty": 1.2, "presence_penalty": 0.1, "frequency_penalty": 0.1}
    drawn = {"temperature": 1.0, "top_k": 64, "top_p": 0.95, "min_p": 0.01}
    several = [{"temperature": 0.0}, drawn, {"temperature": 0.0, **penalties}, {**drawn, **penalties}]
    rows = [SamplingRow(SamplingParams(**one), seed=7, place=2, prompt=[2, 3, 4], answer=[5, 5]) for one in several]
    expected = sample(logits, rows).tokens.tolist()
    torch.cuda.set_sync_debug_mode("error")
    try:
        tokens = sample(logits, rows).tokens
        read = logprobs_of(logits, tokens, [0, 3, 1, 2])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert tokens.tolist() == expected
    logprobs = logits.log_softmax(-1).tolist()
    for logprob, token, of_row, top in zip(read(), expected, logprobs, [0, 3, 1, 2], strict=True):
        assert logprob.token_id == token
        assert logprob.logprob == pytest.approx(of_row[token])
        assert [value for _, value in logprob.top] == pytest.approx(sorted(of_row, reverse=True)[:top])


def test_the_cache_takes_its_share_of_the_free_memory():
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0]
    settings = EngineConfig(model=ROOT / "models" / "wicore-demo", device="cuda", hmt_gpu_threshold=0.05)
    with Engine(settings) as engine:
        taken = free - torch.cuda.mem_get_info()[0]
        assert len(engine.generate("hello", SamplingParams(max_tokens=3)).token_ids) <= 3
    assert 0 < taken <= 0.07 * free


class UnevenStreams(CudaStreams):
    """Each stream now and then rests before it goes on, some longer than others, and one may not wait as it should."""

    def __init__(self, rng, obey) -> None:
        super().__init__(torch.device("cuda", 0))
        self._rng = rng
        self._obey = obey
        self._of: dict = {}  # which stream an event is of
        self._most = {stream: rng.choice([0, 20_000, 2_000_000]) for stream in Stream}  # clock cycles

    def rest(self, stream: Stream) -> None:
        if (most := self._most[stream]) and self._rng.random() < 0.5:
            with torch.cuda.stream(self._stream(stream)):
                torch.cuda._sleep(self._rng.randrange(most))

    def run(self, stream: Stream, work) -> None:
        self.rest(stream)
        super().run(stream, work)

    def wait(self, stream: Stream, event) -> None:
        if self._obey(stream, self._of[event]):
            super().wait(stream, event)

    def record(self, stream: Stream, *, for_threads=False):
        event = super().record(stream, for_threads=for_threads)
        self._of[event] = stream
        return event


def tell(seed: int, *, codec="exact", parts=True, broken=None, length=25) -> None:
    """A story of so many events over pools on the device."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    streams = UnevenStreams(rng, obey_all_but(broken))
    pools = {group: torch.randn(BLOCKS, *LAYOUT.block_shape(group), device="cuda") for group in (G, L)}
    codecs = {group: make_codec(codec, LAYOUT.block_shape(group), torch.float32) for group in (G, L)}
    memory = {group: HostMemory(SLOTS * codecs[group].encoded_bytes, locked=True) for group in (G, L)}
    records = {group: memory[group].tensor.view(SLOTS, -1) for group in (G, L)}
    for group in (G, L):
        codecs[group].encode(torch.randn(SLOTS, *LAYOUT.block_shape(group)), out=records[group])
    copies, slots, codecs = copies_over(rng, pools, records, codecs, streams=streams, copy_rows=copy_rows, parts=parts)

    def step(work) -> None:
        streams.rest(Stream.STEP)
        work()

    story = Story(rng, pools, slots, codecs, copies, step)
    try:
        for _ in range(length):
            story.go_on()
        torch.cuda.synchronize()
        story.compare()
    finally:
        torch.cuda.synchronize()
        for locked in memory.values():
            locked.close()


@pytest.mark.parametrize("codec", ["exact", "q8"])
@pytest.mark.parametrize("parts", [True, False])
def test_copies_beside_steps_give_the_bytes_of_copies_in_order(codec, parts):
    for seed in range(6):
        tell(seed, codec=codec, parts=parts)


@pytest.mark.parametrize("edge", EDGES, ids=lambda edge: f"{edge[0].name}-waits-for-{edge[1].name}")
def test_a_wait_that_is_missing_shows(edge):
    def tell_many() -> None:
        for seed in range(30):
            tell(seed, broken=edge)

    with pytest.raises(AssertionError, match=r"layer|slot|blocks"):
        tell_many()


def test_host_memory_is_locked_as_large_as_it_was_asked_for():
    memory = HostMemory(5 << 20, locked=True)
    assert memory.tensor.is_pinned()
    assert memory.tensor.nbytes == 5 << 20
    memory.close()
    assert not memory.tensor.is_pinned()


LONG_PROMPTS = [[2, *random.Random(n).choices(range(300, 1500), k=800)] for n in range(8)]


def answers_of_small_tiers(directory, **settings):
    """Each prompt three times in turn, and what of it was found in the cache."""
    config = EngineConfig(
        model=ROOT / "models" / "wicore-demo",
        dtype="float32",
        kv_cache_bytes=9_000_000,
        max_model_len=1024,
        max_running=2,
        **{"nvme_cache_path": directory, "nvme_cache_bytes": 100_000_000} | settings,
    )
    with Engine(config) as engine:
        if directory is not None:
            engine._model.mover._cold.tier.restore_seconds = lambda _: 0.0
        params = SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True)
        results = [engine.generate(prompt, params) for _ in range(3 if directory else 1) for prompt in LONG_PROMPTS]
        engine._model.blocks.check_integrity()
    return [result.token_ids for result in results], sum(result.usage.cached_tokens for result in results)


@pytest.fixture(scope="module")
def long_answers_of_the_cpu():
    return answers_of_small_tiers(None, device="cpu", prefix_cache=False)[0]


@pytest.mark.parametrize("large_bytes", [0, 2**40])
@pytest.mark.parametrize("codec", ["exact", "q8"])
def test_a_device_far_too_small_gives_the_same_tokens(
    tmp_path, monkeypatch, long_answers_of_the_cpu, codec, large_bytes
):
    monkeypatch.setitem(StreamedCopies.__init__.__kwdefaults__, "large_bytes", large_bytes)
    settings = {"host_cache_bytes": 12_000_000, "host_cache_codec": codec, "nvme_codec": codec, "hmt_policy": "lru"}
    tokens, cached = answers_of_small_tiers(tmp_path, device="cuda", **settings)
    computed = 24 if codec == "exact" else 8  # The rest was restored from what has been rounded.
    assert tokens[:computed] == (long_answers_of_the_cpu * 3)[:computed]
    assert cached > 0.7 * 2 * 8 * 800
