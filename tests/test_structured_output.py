"""Answers that keep to a grammar, whatever else happens to them; biases of tokens."""

import json
import re
import threading
from dataclasses import replace
from queue import Queue

import numpy as np
import pytest
import torch
from llguidance import LLExecutor

from tests.engine_kit import MODEL, assert_nothing_left, config
from wicore_backend import Engine, SamplingParams
from wicore_backend.engine.grammar import compiler as compiling
from wicore_backend.engine.grammar import progress as progressing
from wicore_backend.engine.grammar.compiler import GrammarCompiler
from wicore_backend.engine.grammar.spec import Grammar
from wicore_backend.engine.request import Deadlines, FinishedEvent, FinishReason, TokensEvent
from wicore_backend.engine.sampler import SamplingRow, sample
from wicore_backend.errors import InvalidArgumentError, WicoreError
from wicore_backend.processor.tokenizer import Tokenizer

QUESTION = "What is 12 + 7?"
SCHEMA = {
    "type": "object",
    "properties": {
        "sum": {"type": "integer", "minimum": 0, "maximum": 999},
        "words": {"type": "array", "items": {"enum": ["one", "two", "größer", "日本"]}, "minItems": 1, "maxItems": 3},
        "sure": {"type": "boolean"},
    },
    "required": ["sum", "words", "sure"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module", params=[False, True], ids=["", "tokens_read_a_step_late"])
def engine(request):
    with Engine(config()) as engine:
        engine._model = replace(engine._model, overlaps=request.param)
        yield engine
        assert_nothing_left(engine, within_s=5)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_checkpoint(MODEL)


@pytest.fixture
def compiler(tokenizer):
    return GrammarCompiler(tokenizer, vocab_size=2048, eos_token_ids={1, 6})


def ask(engine, **params):
    return engine.generate(QUESTION, SamplingParams(**{"max_tokens": 120, "temperature": 0.0} | params))


def texts(engine, **params):
    """Every answer's text and reason, by index, of one request."""
    prompt, events = engine.processor.process(QUESTION), Queue()
    engine.submit(prompt, SamplingParams(**params), sink=events.put)
    found: dict[int, list] = {}
    while not isinstance(event := events.get(timeout=60), FinishedEvent):
        text, reason = found.get(event.index, ["", None])
        found[event.index] = [text + event.text, reason or event.reason]
    if event.error is not None:
        raise event.error
    return [found[index] for index in sorted(found)]


def valid(text):
    value = json.loads(text)
    assert list(value) == ["sum", "words", "sure"], text
    assert type(value["sum"]) is int, text
    assert 0 <= value["sum"] <= 999, text
    assert 1 <= len(value["words"]) <= 3, text
    assert set(value["words"]) <= {"one", "two", "größer", "日本"}, text
    assert type(value["sure"]) is bool, text
    return True


# Forms and ends.


@pytest.mark.parametrize("temperature", [0.0, 1.0, 100.0])
def test_json_is_by_its_schema(engine, temperature):
    answers = texts(engine, temperature=temperature, seed=3, n=8, max_tokens=400, grammar={"json_schema": SCHEMA})
    assert all(reason is FinishReason.STOP and valid(text) for text, reason in answers)
    assert len({text for text, _ in answers}) == (1 if temperature == 0 else 8)


@pytest.mark.parametrize(
    ("grammar", "form"),
    [
        ({"regex": "[0-9]{2}-[a-c]+x"}, "[0-9]{2}-[a-c]+x"),
        ({"regex": "[😀-😎]{3}日?é"}, "[😀-😎]{3}日?é"),  # None of these is a token: bytes make them.
        ({"choice": ["yes", "no", 'say "no"\n', "日本"]}, 'yes|no|say "no"\n|日本'),
        ({"lark": 'start: "<" WORD ("," WORD){0,3} ">"\nWORD: /[a-z]{1,4}/'}, "<[a-z]{1,4}(,[a-z]{1,4}){0,3}>"),
        ('{"regex": "a{4}"}', "a{4}"),
    ],
)
def test_an_answer_has_the_form_that_was_asked_for(engine, grammar, form):
    for seed in range(4):
        result = ask(engine, temperature=2.0, seed=seed, grammar=grammar)
        assert re.fullmatch(form, result.text), result.text
        assert result.finish_reason is FinishReason.STOP


@pytest.mark.parametrize(
    ("form", "valid", "invalid"),
    [
        ("date", ["2024-02-29", "2000-02-29", "1999-12-31", "0400-02-29"], ["2023-02-29", "1900-02-29", "0000-01-01"]),
        ("time", ["23:59:59Z", "00:00:00.5+14:00"], ["12:00:60Z", "24:00:00Z", "12:00:00"]),
        (
            "date-time",
            ["2024-02-29T00:00:00Z"],
            ["2023-02-29T00:00:00Z", "2024-01-01 00:00:00Z", "2024-01-01T00:00:60Z"],
        ),
    ],
)
@pytest.mark.parametrize(
    "more", [{}, {"pattern": "^[^x]*$"}, {"type": ["string", "null"]}, {"allOf": [{"minLength": 1}]}]
)
def test_dates_are_of_the_calendar(compiler, tokenizer, form, valid, invalid, more):
    def allowed(text):
        (answer,) = compiler.begin(Grammar(json_schema={"type": "string", "format": form} | more), 1)
        try:
            for token in tokenizer.encode(f'"{text}"'):
                answer.accept(token)
        except WicoreError:
            return False
        return answer.complete

    assert [allowed(text) for text in valid + invalid] == [True] * len(valid) + [False] * len(invalid)


def test_any_object_is_json(engine):
    result = ask(engine, grammar={"json_object": True}, temperature=1.0, seed=5, max_tokens=400)
    assert isinstance(json.loads(result.text), dict)


def test_an_answer_ends_with_the_token_that_completes_it(engine):
    result = ask(engine, grammar={"choice": ["12"]}, max_tokens=400)
    assert result.text == "12"
    assert result.finish_reason is FinishReason.STOP
    assert result.usage.completion_tokens == len(result.token_ids) <= 2


def test_the_last_allowed_token_completes_an_answer_and_one_less_cuts_it(engine):
    whole = ask(engine, grammar={"regex": "[0-9]{6}"}, logit_bias={60: 100})
    count = whole.usage.completion_tokens
    assert ask(engine, grammar={"regex": "[0-9]{6}"}, logit_bias={60: 100}, max_tokens=count).finish_reason == "stop"
    cut = ask(engine, grammar={"regex": "[0-9]{6}"}, logit_bias={60: 100}, max_tokens=count - 1)
    assert cut.finish_reason is FinishReason.LENGTH
    assert whole.text.startswith(cut.text)


def test_the_model_may_end_where_the_grammar_lets_it_and_nowhere_else(engine):
    ends = engine._model.eos_token_ids
    eager = dict.fromkeys(ends, 100.0)
    assert ask(engine, grammar={"regex": "[a-z]{3,9}"}, logit_bias=eager).usage.completion_tokens <= 4
    assert len(ask(engine, grammar={"regex": "[a-z]{3,9}"}, logit_bias=eager).text) in (3, 4, 5)
    assert len(ask(engine, grammar={"regex": "[a-z]{3,9}"}, logit_bias=dict.fromkeys(ends, -100.0)).text) == 9


def test_stop_texts_and_tokens_cut_an_answer(engine):
    cut = ask(engine, grammar={"json_schema": SCHEMA}, stop='"words"')
    assert cut.finish_reason is FinishReason.STOP
    assert cut.text.rstrip().endswith(",")
    brace = engine.processor.tokenizer.encode("{")
    assert ask(engine, grammar={"json_schema": SCHEMA}, stop_token_ids=brace).text == ""


def test_min_tokens_hold_the_end_back(engine):
    eager = dict.fromkeys(engine._model.eos_token_ids, 100.0)
    assert ask(engine, logit_bias=eager).usage.completion_tokens == 1
    assert ask(engine, logit_bias=eager, min_tokens=7).usage.completion_tokens == 8
    assert ask(engine, logit_bias=eager, grammar={"regex": "[a-z]{1,30}"}, min_tokens=7).usage.completion_tokens == 8
    assert ask(engine, logit_bias=eager, grammar={"regex": "[a-z]"}, min_tokens=7).usage.completion_tokens == 1


def test_tags_come_after_text_or_alone(engine):
    def form(**more):
        tags = [
            {"begin": '{"f": "add", "x": ', "json_schema": {"type": "integer", "maximum": 9, "minimum": 0}, "end": "}"},
            {"begin": '{"f": "say", "x": ', "json_schema": {"enum": ["hi"]}, "end": "}"},
        ]
        return {"tags": {"trigger": '{"f": "', "tags": tags} | more}

    call = r'\{"f": "(add", "x": [0-9]|say", "x": "hi")\}'
    for seed in range(3):
        many = ask(engine, grammar=form(text=False), temperature=3.0, seed=seed, max_tokens=400)
        assert re.fullmatch(rf"{call}(\n{call})*", many.text) or many.finish_reason == "length", many.text
        one = ask(engine, grammar=form(text=False, many=False, tails=["\n"]), temperature=3.0, seed=seed)
        assert re.fullmatch(rf"{call}\n?", one.text), one.text
        free = ask(engine, grammar=form(), temperature=1.0, seed=seed, max_tokens=60)
        assert re.search(r'^\{"f": "', free.text, re.MULTILINE) is None or re.search(call, free.text), free.text
        other = ask(engine, grammar=form(text=False, otherwise={"type": "boolean"}), temperature=3.0, seed=seed)
        assert re.fullmatch(rf"{call}(\n{call})*|true|false", other.text) or other.finish_reason == "length"


def test_a_line_that_begins_with_the_trigger_turns_text_into_tags(compiler, tokenizer):
    tags = {"begin": "<call>", "json_schema": {"const": 1}, "end": "</call>"}
    grammar = Grammar(tags={"trigger": "<ca", "tags": [tags], "tails": ["!"]})

    def follows(text):
        (answer,) = compiler.begin(grammar, 1)
        for token in tokenizer.encode(text):
            answer.accept(token)
        bits = np.unpackbits(progressing.allowed_tokens({0: answer}, 1, 2048)[0], bitorder="little")
        return {tokenizer.token_text(int(token)) for token in np.flatnonzero(bits)}

    assert {"<eos>", "a", "\n"} <= follows("say <call>")
    assert follows("say\n<ca") <= {"l", "ll", "<0x6C>"}
    assert follows("say\n<call>") <= {"1", "<0x31>"}
    assert {"<eos>", "!", "\n"} <= follows("<call>1</call>")
    assert "a" not in follows("<call>1</call>")


# What happens to answers.


def test_grammars_ride_in_one_batch_with_others_and_change_none(engine):
    kinds = [
        {"grammar": {"json_schema": SCHEMA}},
        {},
        {"grammar": {"regex": "[a-z]{5}"}, "temperature": 1.5, "seed": 4},
        {"logit_bias": {300: 100.0}, "max_tokens": 5},
        {"grammar": {"choice": ["a", "b"]}, "presence_penalty": 1.0},
        {"grammar": {"json_object": True}, "temperature": 1.0, "seed": 9, "max_tokens": 60},
    ] * 3
    alone = [ask(engine, **kind).token_ids for kind in kinds[:6]] * 3
    streams = [
        engine.stream(QUESTION, SamplingParams(**{"max_tokens": 120, "temperature": 0.0} | kind)) for kind in kinds
    ]
    assert [stream.collect().token_ids for stream in streams] == alone


def test_preempted_answers_go_on_in_their_grammar(engine):
    params = {"temperature": 1.0, "seed": 11, "n": 4, "max_tokens": 400, "grammar": {"json_schema": SCHEMA}}
    undisturbed = texts(engine, **params)
    assert all(valid(text) for text, _ in undisturbed)
    with Engine(config(kv_cache_bytes=9_000_000, max_model_len=1024, max_running=2)) as small:
        small._model = replace(small._model, overlaps=engine._model.overlaps)
        found: Queue = Queue()
        threads = [threading.Thread(target=lambda: found.put(texts(small, **params))) for _ in range(2)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):  # Higher classes take its place again and again.
            prompt, done = small.processor.process("The code of Anna is 4821. " * 20), threading.Event()
            small.submit(
                prompt,
                SamplingParams(max_tokens=2),
                sink=lambda event, done=done: done.set() if isinstance(event, FinishedEvent) else None,
                priority=-10,
            )
            assert done.wait(60)
        assert small.statistics().scheduler.preemptions > 0
        assert [found.get(timeout=10) for _ in range(2)] == [undisturbed] * 2


def test_best_of_chooses_among_valid_answers(engine):
    answers = texts(engine, temperature=2.0, seed=1, n=2, best_of=6, max_tokens=400, grammar={"json_schema": SCHEMA})
    assert len(answers) == 2
    assert all(valid(text) for text, _ in answers)


def test_logprobs_are_the_models_own_and_not_of_the_grammar(engine):
    result = ask(engine, grammar={"choice": ["z"]}, logprobs=1)
    assert result.logprobs[0].top[0][0] != result.token_ids[0]
    assert result.logprobs[0].logprob < result.logprobs[0].top[0][1]


def test_cancels_and_deadlines_leave_nothing_behind(engine):
    endless = {"lark": 'start: "a"*'}
    for _ in range(3):
        stream = engine.stream(QUESTION, SamplingParams(grammar=endless, logit_bias=dict.fromkeys((1, 6), -100.0)))
        assert isinstance(next(stream), TokensEvent)
        stream.close()
    events = Queue()
    params = SamplingParams(grammar=endless, logit_bias=dict.fromkeys((1, 6), -100.0))
    prompt = engine.processor.process(QUESTION)
    engine.submit(prompt, params, sink=events.put, deadlines=Deadlines(total_s=0.3))
    while not isinstance(event := events.get(timeout=10), FinishedEvent):
        assert set(event.text) <= {"a"}
    assert event.reason is FinishReason.DEADLINE
    assert_nothing_left(engine, within_s=5)


def test_a_grammar_that_grows_too_complex_ends_its_own_request_alone(engine):
    greedy = {"regex": "((a{0,1000}){0,1000}){0,1000}"}
    stream = engine.stream(QUESTION, SamplingParams(grammar=greedy, logit_bias=dict.fromkeys((1, 6), -100.0)))
    other = engine.stream(QUESTION, SamplingParams(max_tokens=40, ignore_eos=True))
    with pytest.raises(InvalidArgumentError, match=r"grammar: .*too many"):
        stream.collect()
    assert other.collect().usage.completion_tokens == 40


def test_a_token_that_the_grammar_does_not_allow_is_an_error_and_no_answer(compiler):
    (answer,) = compiler.begin(Grammar(choice=["yes"]), 1)
    with pytest.raises(WicoreError, match="token 300 is not what the grammar allows"):
        answer.accept(300)


# Masks.


def test_many_masks_are_those_of_each_alone(compiler, tokenizer, monkeypatch):
    grammars = [
        Grammar(json_schema=SCHEMA),
        Grammar(regex="[a-z]+"),
        Grammar(choice=["日本"]),
        Grammar(json_object=True),
    ]
    answers = {row: compiler.begin(grammar, 1)[0] for row, grammar in zip((0, 2, 3, 5), grammars, strict=True)}
    one_by_one = progressing.allowed_tokens(answers, 6, 2048)
    monkeypatch.setattr(progressing, "_executor", lambda: LLExecutor(2))
    assert (progressing.allowed_tokens(answers, 6, 2048) == one_by_one).all()
    assert (one_by_one[[1, 4]] == 255).all()
    letters = np.flatnonzero(np.unpackbits(one_by_one[2], bitorder="little"))
    assert all(re.fullmatch("[a-z]+", tokenizer.token_bytes(int(token)).decode()) for token in letters)


def test_a_padded_vocabulary_has_no_tokens_past_the_tokenizers(tokenizer):
    compiler = GrammarCompiler(tokenizer, vocab_size=2100, eos_token_ids={1, 6})
    (answer,) = compiler.begin(Grammar(lark="start: /(.|\\n)*/"), 1)
    bits = np.unpackbits(progressing.allowed_tokens({0: answer}, 1, 2100)[0], bitorder="little")[:2100]
    assert not bits[2048:].any()
    logits = torch.zeros(1, 2100)
    logits[0, 2050] = 100
    assert sample(logits, [SamplingRow(SamplingParams(), 0, 0, grammar=answer)]).tokens.item() < 2048


def test_free_text_has_no_special_tokens_but_the_ends(compiler, tokenizer):
    (answer,) = compiler.begin(Grammar(lark="start: /(.|\\n)*/"), 1)
    bits = np.unpackbits(progressing.allowed_tokens({0: answer}, 1, 2048)[0], bitorder="little")
    assert {int(token) for token in np.flatnonzero(bits) if tokenizer.is_special(int(token))} == {1, 6}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_chooses_among_the_same_tokens(compiler):
    grammars = [Grammar(json_schema=SCHEMA), Grammar(regex="[a-z]{3}"), Grammar(choice=["日本", "yes"])]
    answers = [compiler.begin(grammar, 1)[0] for grammar in grammars]
    rows = [SamplingRow(SamplingParams(logit_bias={300: 5.0}), seed, 0, grammar=a) for seed, a in enumerate(answers)]
    rows.insert(1, SamplingRow(SamplingParams(logit_bias={7: -100.0}), 9, 0))
    logits = torch.randn(4, 2048, generator=torch.Generator().manual_seed(0))
    assert sample(logits.cuda(), rows).tokens.tolist() == sample(logits, rows).tokens.tolist()


# Biases.


def test_100_leaves_no_other_token_and_minus_100_rules_one_out(engine):
    assert set(ask(engine, logit_bias={"300": 100}, max_tokens=8).token_ids) == {300}
    usual = ask(engine, max_tokens=1).token_ids[0]
    for seed in range(5):
        other = ask(engine, max_tokens=20, temperature=1.0, seed=seed, logit_bias={usual: -100})
        assert usual not in other.token_ids


def test_a_bias_is_added_after_penalties_and_before_the_temperature():
    logits = torch.tensor([[1.0, 2.0, 0.0]])
    row = {"repetition_penalty": 2.0, "logit_bias": {0: -1.5, 2: 0.25}}  # 0.5 - 1.5, 1, 0.25 once penalised.
    rows = [SamplingRow(SamplingParams(**row | {"temperature": 0.5}), s, 0, [0, 1]) for s in range(4000)]
    drawn = torch.bincount(sample(logits.repeat(4000, 1), rows).tokens, minlength=3) / 4000
    expected = (torch.tensor([-1.0, 1.0, 0.25]) / 0.5).softmax(0)
    assert torch.allclose(drawn, expected, atol=0.03)
    assert (logits == torch.tensor([[1.0, 2.0, 0.0]])).all()


def test_draws_follow_the_distribution_among_what_is_allowed(compiler, tokenizer):
    logits = torch.randn(2048, generator=torch.Generator().manual_seed(0))
    (answer,) = compiler.begin(Grammar(regex="[0-4]x"), 1)
    rows = [SamplingRow(SamplingParams(temperature=1.0), seed, 0, grammar=answer) for seed in range(2000)]
    drawn = torch.bincount(sample(logits.repeat(2000, 1), rows).tokens, minlength=2048) / 2000
    allowed = [i for i in range(2048) if re.fullmatch(b"[0-4]x?", tokenizer.token_bytes(i))]
    assert torch.allclose(drawn[allowed], logits[allowed].softmax(0), atol=0.05)
    assert drawn[allowed].sum() == pytest.approx(1)


# Compiling.


def test_a_grammar_compiles_once(compiler, monkeypatch):
    compiler.begin(Grammar(choice=["a", "b"]), 2)
    assert compiler.has(Grammar(choice=["a", "b"]))
    assert not compiler.has(Grammar(choice=["a", "c"]))
    assert compiler.has(None)
    monkeypatch.setattr(compiling, "LLMatcher", None)
    compiler.begin(Grammar(choice=["a", "b"]), 1)


def test_grammars_that_nobody_asks_for_are_forgotten(compiler, monkeypatch):
    monkeypatch.setattr(compiling, "_KEPT", 2)
    for text in "abac":
        compiler.begin(Grammar(choice=[text]), 1)
    assert [compiler.has(Grammar(choice=[text])) for text in "abc"] == [True, False, True]


def test_answers_of_one_grammar_go_their_own_ways(compiler, tokenizer):
    first, second = compiler.begin(Grammar(choice=["ab", "cd"]), 2)
    first.accept(tokenizer.encode("ab")[0])
    assert first.complete
    assert not second.complete


def test_other_requests_run_while_a_grammar_compiles(engine, monkeypatch):
    began, go_on = threading.Event(), threading.Event()
    source_of = compiling.source_of

    def slow(grammar):
        began.set()
        assert go_on.wait(30)
        return source_of(grammar)

    monkeypatch.setattr(compiling, "source_of", slow)
    answers: Queue = Queue()
    thread = threading.Thread(target=lambda: answers.put(ask(engine, grammar={"choice": ["late"]}).text))
    thread.start()
    assert began.wait(10)
    assert ask(engine, max_tokens=4).token_ids
    go_on.set()
    assert answers.get(timeout=10) == "late"
    thread.join()


# What is refused.


@pytest.mark.parametrize(
    ("grammar", "named"),
    [
        ({"json_schema": {"not": {"type": "string"}}}, r'grammar.json_schema is not supported: .*"not"'),
        ({"json_schema": {"type": "array", "uniqueItems": True}}, "uniqueItems"),
        ({"json_schema": {"type": "string", "format": "nobody-knows"}}, "nobody-knows"),
        ({"json_schema": {"$ref": "https://example.com/a.json"}}, "example.com"),
        ({"json_schema": {"$ref": "file:///etc/passwd"}}, "not present in a registry"),
        ({"json_schema": {"type": "object", "minProperties": 2}}, "minProperties = 2 at the top cannot be kept"),
        ({"json_schema": {"items": {"properties": {"a": {"minProperties": 2}}}}}, "at /items/properties/a cannot"),
        ({"json_schema": {"oneOf": [{"type": "integer"}, {"type": "number"}]}}, "oneOf"),
        ({"json_schema": False}, "Unsatisfiable"),
        ({"json_schema": {"format": "date", "allOf": 5}}, "allOf"),
        ({"json_schema": {"enum": []}}, "Unsatisfiable"),
        ({"json_schema": {"x-guidance": {"lenient": True}, "not": {}}}, '"not"'),
        ({"regex": "(?=a)b"}, "grammar.regex is not supported: .*look-ahead"),
        ({"regex": "("}, "unclosed group"),
        ({"lark": "start: nobody"}, 'unknown name: "nobody"'),
        ({"choice": []}, "choice"),
        ({"choice": ["a"], "regex": "a"}, "one of json_schema, .* not regex and choice"),
        ({}, "grammar: it takes one of json_schema"),
        ({"json_object": False}, "leave the grammar out"),
        ({"schema": {}}, "'grammar.schema' is not a setting; there are: choice, json_object"),
        ({"json_schema": "{}"}, "json_schema"),
        ({"tags": {"trigger": "<", "tags": [{"begin": "a", "json_schema": {}}]}}, "does not begin with the trigger"),
        ({"tags": {"trigger": "\n", "tags": [{"begin": "\n", "json_schema": {}}]}}, "line break"),
        ({"tags": {"trigger": "<", "tags": [{"begin": "<", "json_schema": {}}], "otherwise": {}}}, "otherwise"),
        ("[1]", "grammar"),
        ("{", "not JSON"),
        (7, "grammar = 7"),
    ],
)
def test_what_cannot_be_kept_is_refused_by_name(engine, grammar, named):
    with pytest.raises(InvalidArgumentError, match=named) as caught:
        ask(engine, grammar=grammar)
    assert "grammar" in str(caught.value)


@pytest.mark.parametrize(
    ("params", "named"),
    [
        ({"logit_bias": {"a": 1}}, "logit_bias.a"),
        ({"logit_bias": {5: 101}}, "logit_bias.5"),
        ({"logit_bias": {5: float("nan")}}, "logit_bias.5"),
        ({"logit_bias": {-1: 1}}, "logit_bias.-1"),
        ({"logit_bias": {5: 1, "5": 2}}, "token 5 is there twice"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"logit_bias": dict.fromkeys(range(1025), 1)}, "logit_bias"),
        ({"logit_bias": {2048: 1}}, "token id 2048 is outside the vocabulary of 2,048, in logit_bias"),
        ({"logit_bias": {True: 1}}, "logit_bias"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens is 5, more than max_tokens = 4"),
        ({"grammar": {"choice": ["a"]}, "ignore_eos": True}, "ignore_eos does not go with a grammar"),
    ],
)
def test_biases_and_bounds_are_checked(engine, params, named):
    with pytest.raises(InvalidArgumentError, match=named):
        ask(engine, **params)
