"""From what a caller submits to a job for the loop, on the caller's thread: checked, named, its grammar compiled."""

from __future__ import annotations

import secrets

from wicore_backend.engine.generation import Generation
from wicore_backend.engine.grammar.compiler import GrammarCompiler
from wicore_backend.engine.grammar.progress import GrammarProgress
from wicore_backend.engine.grammar.spec import Grammar
from wicore_backend.engine.job import Job
from wicore_backend.engine.loading import LoadedModel
from wicore_backend.engine.request import Request, Sequence
from wicore_backend.engine.sampling_params import SamplingParams
from wicore_backend.errors import InvalidArgumentError
from wicore_backend.hmt.names import BlockNames
from wicore_backend.processor.prompt import Prompt


class Intake:
    """Makes jobs of requests. On any thread, and on several at once.

    Parameters
    ----------
    prefix_cache
        Whether blocks are found again by their names.
    """

    def __init__(self, model: LoadedModel, *, prefix_cache: bool) -> None:
        self._model = model
        self._prefix_cache = prefix_cache
        self._grammars = GrammarCompiler(
            model.processor.tokenizer, vocab_size=model.vocab_size, eos_token_ids=model.eos_token_ids
        )

    def checked(self, prompt: Prompt, params: SamplingParams) -> SamplingParams:
        """`params`, completed by the model's own defaults, if it can compute such a request.

        Raises
        ------
        InvalidArgumentError
            If it cannot.
        """
        params = params.completed(self._model.generation_defaults)
        limit, vocab = self._model.max_model_len, self._model.vocab_size
        if not 1 <= len(prompt) < limit:
            raise InvalidArgumentError(
                f"the prompt has {len(prompt):,} tokens; it takes 1 to {limit - 1:,} (max_model_len = {limit:,})"
            )
        prompted = int(prompt.token_ids.min()), int(prompt.token_ids.max())
        places = (
            ("the prompt", prompted),
            ("stop_token_ids", params.stop_token_ids),
            ("logit_bias", params.logit_bias),
        )
        for place, tokens in places:
            for token in tokens:
                if not 0 <= token < vocab:
                    raise InvalidArgumentError(f"token id {token} is outside the vocabulary of {vocab:,}, in {place}")
        self._check_images(prompt)
        return params

    def job(self, request: Request) -> Job:
        """What the loop takes over: the request, whose parameters have been `checked`, and an answer for each wanted.

        Raises
        ------
        InvalidArgumentError
            If its grammar is not supported. To compile a new one may take a second or two.
        OverloadedError
            If too many grammars are being compiled.
        """
        params = request.params
        seed = secrets.randbits(63) if params.seed is None else params.seed
        grammars = self._grammars.begin(params.grammar, params.answers)
        return Job(request, [self._generation(request, index, seed, each) for index, each in enumerate(grammars)])

    def has_compiled(self, grammar: Grammar | None) -> bool:
        """Whether `job` waits for no grammar."""
        return self._grammars.has(grammar)

    def compile(self, grammar: Grammar | None) -> None:
        """Compile a grammar; raises what `job` would."""
        self._grammars.begin(grammar, 0)

    def _check_images(self, prompt: Prompt) -> None:
        tokens = self._model.soft_tokens_per_image
        if prompt.images and not tokens:
            raise InvalidArgumentError("this model has no vision tower; send text only")
        for image in prompt.images:
            if image.length != tokens or not 0 <= image.start <= len(prompt) - image.length:
                raise InvalidArgumentError(
                    f"an image spans tokens {image.start} to {image.end} of {len(prompt)}; each takes {tokens} inside "
                    "the prompt"
                )

    def _generation(self, request: Request, index: int, seed: int, grammar: GrammarProgress | None) -> Generation:
        """One of a request's answers, with its blocks' names."""
        model, params = self._model, request.params
        room = model.max_model_len - len(request.prompt)
        sequence = Sequence(request, len(request.prompt) + min(params.max_tokens or room, room), index=index)
        if params.prompt_logprobs is None:  # Those need the whole prompt computed.
            names = BlockNames(model.name_scheme, sequence.tokens, request.prompt.images, request.tenant)
            sequence.twin_key = names.whole(len(request.prompt))
            sequence.names = names if self._prefix_cache else None
        own_stops = frozenset[int]() if params.ignore_eos else model.eos_token_ids
        return Generation(
            sequence,
            token_bytes=model.processor.tokenizer.token_bytes,
            stop_tokens=frozenset(params.stop_token_ids) | own_stops,
            seed=(seed + index) % 2**63,
            grammar=grammar,
        )
