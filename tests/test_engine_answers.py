"""The engine's answers: those of the model, whatever runs beside them and however memory and steps are cut."""

import io
import time

import pytest
import torch
from PIL import Image

from tests.engine_kit import MODEL, PICTURE, PROMPTS, assert_nothing_left, config, greedy
from wicore_backend import Engine, SamplingParams
from wicore_backend.engine.request import FinishedEvent, FinishReason, PriorityClass, TokensEvent
from wicore_backend.engine.results import EventStream
from wicore_backend.errors import InvalidArgumentError

pytest_plugins = ["tests.engine_fixtures"]


def test_a_batch_gives_what_single_requests_give(engine, alone):
    prompts = [prompt for prompt, _ in PROMPTS] * 3
    images = [images for _, images in PROMPTS] * 3
    results = engine.generate(prompts, greedy(), images=images)
    assert [result.token_ids for result in results] == alone * 3


@pytest.mark.parametrize(
    "settings",
    [
        {"max_batch_tokens": 72, "max_running": 8},  # An image is 64: chunks around images.
        {"block_size": 7, "max_batch_tokens": 200},
        {"max_running": 2, "max_batch_tokens": 66},
        {"kv_cache_bytes": 11 * 2**20, "max_model_len": 2048},  # Little memory: requests wait for one another.
    ],
)
def test_chunks_blocks_and_memory_do_not_change_an_answer(alone, settings):
    with Engine(config(**settings)) as engine:
        prompts, images = [p for p, _ in PROMPTS], [i for _, i in PROMPTS]
        results = engine.generate(prompts * 2, greedy(), images=images * 2)
        assert [result.token_ids for result in results] == alone * 2
        assert_nothing_left(engine)


def test_little_memory_and_higher_classes_preempt_and_change_no_token(alone):
    with Engine(config(kv_cache_bytes=9_000_000, max_model_len=1024, max_running=1)) as engine:
        streams = []

        def submit(number: int, priority: int, tokens: int) -> None:
            prompt, images = PROMPTS[number % len(PROMPTS)]
            stream = EventStream(lambda: None)
            processed = engine.processor.process(prompt, images=images)
            engine.submit(processed, greedy(tokens), sink=stream.put, priority=priority)
            streams.append((number % len(PROMPTS), stream))

        for number in range(6):
            submit(number, PriorityClass.BATCH, 300)
        while not engine.statistics().running:
            time.sleep(0.001)
        for number in range(5):
            submit(number, PriorityClass.REALTIME, 16)
        for number, stream in streams:
            assert stream.collect().token_ids[:16] == alone[number]
        assert engine.statistics().scheduler.preemptions > 0
        assert_nothing_left(engine)


def test_the_answers_are_those_of_transformers(engine):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    reference = AutoModelForImageTextToText.from_pretrained(MODEL, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(MODEL)
    picture = Image.open(io.BytesIO(PICTURE)).convert("RGB")
    for question, pictures in [
        ("Describe this picture.", [picture]),
        ("What is 3 + 4?", []),
        ("描述这张图片", [picture]),
    ]:
        content = [{"type": "image", "image": p} for p in pictures] + [{"type": "text", "text": question}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        out = reference.generate(**inputs, max_new_tokens=48, do_sample=False)
        expected = out[0, inputs["input_ids"].shape[1] :].tolist()
        result = engine.generate(
            question, SamplingParams(max_tokens=48, temperature=0.0), images=[PICTURE] * len(pictures)
        )
        assert result.token_ids == expected


def test_sampling_depends_on_the_seed_alone(engine):
    params = SamplingParams(
        max_tokens=24, temperature=20.0, seed=11, ignore_eos=True
    )  # Hot, or the demo model is too sure.
    first = engine.generate("hello", params)
    crowd = engine.generate(["hello", "What is 1 + 1?", "hello", "你好"], params)
    assert crowd[0].token_ids == crowd[2].token_ids == first.token_ids
    other = engine.generate("hello", params.model_copy(update={"seed": 12}))
    assert other.token_ids != first.token_ids


def test_an_answer_ends_at_eos_length_stop_token_or_stop_string(engine):
    natural = engine.generate("What is 12 + 7?", SamplingParams(max_tokens=50, temperature=0.0))
    assert natural.finish_reason is FinishReason.STOP
    assert natural.text == "19"
    assert engine.processor.tokenizer.is_special(natural.token_ids[-1])

    sentence = engine.generate("Describe this picture.", SamplingParams(temperature=0.0), images=[PICTURE])
    cut = engine.generate("Describe this picture.", SamplingParams(temperature=0.0, stop=" red"), images=[PICTURE])
    assert cut.finish_reason is FinishReason.STOP
    assert " red" in sentence.text
    assert cut.text == sentence.text.split(" red")[0]

    short = engine.generate("Describe this picture.", SamplingParams(temperature=0.0, max_tokens=3), images=[PICTURE])
    assert short.finish_reason is FinishReason.LENGTH
    assert short.token_ids == sentence.token_ids[:3]

    stop_id = sentence.token_ids[4]
    stopped = engine.generate(
        "Describe this picture.", SamplingParams(temperature=0.0, stop_token_ids=(stop_id,)), images=[PICTURE]
    )
    assert stopped.token_ids == sentence.token_ids[:5]
    assert stopped.finish_reason is FinishReason.STOP


def test_an_answer_ends_with_the_context():
    with Engine(config(max_model_len=600)) as engine:
        prompt = list(range(300, 300 + 590))
        result = engine.generate(prompt, SamplingParams(temperature=0.0, ignore_eos=True))
        assert (len(result.token_ids), result.finish_reason) == (10, FinishReason.LENGTH)
        with pytest.raises(InvalidArgumentError, match=r"600 tokens.* limit of 599"):
            engine.generate(list(range(300, 900)))


def test_logprobs_are_those_of_the_prompt_computed_at_once(engine):
    """The prompt's logprobs of prompt + answer must be the answer's logprobs, chunk by chunk or token by token."""
    ids = [2, *range(300, 320)]
    result = engine.generate(ids, greedy(12, logprobs=2))
    again = engine.generate([*ids, *result.token_ids], greedy(1, prompt_logprobs=2))
    assert again.prompt_logprobs[0] is None
    assert len(again.prompt_logprobs) == len(ids) + 12
    for generated, prompted in zip(result.logprobs, again.prompt_logprobs[len(ids) :], strict=True):
        assert generated.token_id == prompted.token_id == generated.top[0][0]
        assert generated.logprob == pytest.approx(prompted.logprob, abs=1e-4)
        assert [t for t, _ in generated.top] == [t for t, _ in prompted.top]


def test_prompt_logprobs_do_not_depend_on_chunks(engine):
    ids = [2, *range(300, 500)]
    whole = engine.generate(ids, greedy(1, prompt_logprobs=0)).prompt_logprobs
    with Engine(config(max_batch_tokens=67, max_running=3)) as small:
        chunked = small.generate(ids, greedy(1, prompt_logprobs=0)).prompt_logprobs
    assert [t.logprob for t in chunked[1:]] == pytest.approx([t.logprob for t in whole[1:]], abs=1e-4)


def test_events_come_one_by_one_and_add_up(engine):
    events = list(engine.stream("Describe this picture.", SamplingParams(temperature=0.0), images=[PICTURE]))
    assert all(isinstance(event, TokensEvent) for event in events[:-1])
    assert isinstance(events[-1], FinishedEvent)
    whole = engine.generate("Describe this picture.", SamplingParams(temperature=0.0), images=[PICTURE])
    assert "".join(event.text for event in events[:-1]) == whole.text
    assert events[-1].usage.prompt_tokens == whole.usage.prompt_tokens
    assert 0 <= events[-1].usage.queue_s <= events[-1].usage.ttft_s <= events[-1].usage.total_s


def answers(engine: Engine, prompt, params: SamplingParams) -> tuple[list[list[int]], FinishedEvent]:
    tokens: list[list[int]] = [[] for _ in range(params.n)]
    for event in engine.stream(prompt, params):
        if isinstance(event, FinishedEvent):
            return tokens, event
        tokens[event.index] += event.token_ids
    raise AssertionError("no last event")


def test_n_answers_are_those_of_n_requests_and_their_prompt_is_computed_once(engine):
    prompt = [2, *range(300, 437)]
    params = greedy(12, temperature=3.0, seed=7, n=4)
    before = engine.statistics()
    tokens, last = answers(engine, prompt, params)
    after = engine.statistics()
    assert after.scheduler.shared_prefill_tokens - before.scheduler.shared_prefill_tokens == 3 * 138
    expected = [engine.generate(prompt, greedy(12, temperature=3.0, seed=7 + n)).token_ids for n in range(4)]
    assert tokens == expected
    assert len({tuple(t) for t in tokens}) == 4
    assert last.usage.completion_tokens == 48
    assert_nothing_left(engine)


def test_best_of_gives_the_likeliest(engine):
    prompt = [2, *range(300, 337)]
    each = [engine.generate(prompt, greedy(12, temperature=3.0, seed=7 + n, logprobs=0)) for n in range(5)]
    ranked = sorted(each, key=lambda r: -sum(p.logprob for p in r.logprobs))
    tokens, last = answers(engine, prompt, greedy(12, temperature=3.0, seed=7, n=2, best_of=5))
    assert tokens == [ranked[0].token_ids, ranked[1].token_ids]
    assert last.usage.completion_tokens == 60
    assert_nothing_left(engine)
