"""Tokens of answers are counted as they are told, and the total is what requests' usages say."""

from tests.engine_kit import greedy
from wicore_backend.engine.generation import Generation
from wicore_backend.errors import EngineError

pytest_plugins = ["tests.engine_fixtures"]


def test_an_answer_that_grows_is_counted_and_not_again_when_it_ends(engine):
    before = engine.statistics()
    stream = engine.stream("hello", greedy(400))
    for _ in range(20):
        next(stream)
    now = engine.statistics()
    assert sum(now.requests.values()) == sum(before.requests.values()), "it has not ended"
    assert now.completion_tokens - before.completion_tokens >= 19  # The one just told may be about to be counted.
    *_, end = stream
    assert engine.statistics().completion_tokens - before.completion_tokens == end.usage.completion_tokens == 400


def test_the_total_is_exact_for_several_answers_and_for_one_whose_token_cannot_be_taken(engine, monkeypatch):
    before = engine.statistics().completion_tokens
    several = greedy(12, n=3, best_of=5, temperature=1.0)
    assert engine.generate("hello", several).usage.completion_tokens == 5 * 12
    assert engine.statistics().completion_tokens - before == 5 * 12

    def failing(self, _):
        if self.sequence.answered == 5:
            raise RuntimeError("no such character")
        return False

    monkeypatch.setattr(Generation, "_completes", failing)
    stream = engine.stream([2, 300], greedy(30))
    *tokens, end = stream
    assert isinstance(end.error, EngineError)
    assert sum(len(event.token_ids) for event in tokens) == end.usage.completion_tokens == 5
    assert engine.statistics().completion_tokens - before == 5 * 12 + 5
