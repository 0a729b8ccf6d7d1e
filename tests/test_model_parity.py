"""The model against transformers' own Gemma-3: see `tests/model_parity.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.accuracy import relative_error
from tests.gemma3_driver import Driver
from tests.gemma3_random import FIRST_TEXT_TOKEN, IMAGE_TOKEN, VISION, write_random_checkpoint
from tests.model_parity import (
    CASES,
    FIVE_TO_ONE,
    GLOBAL,
    IMAGE,
    LOCAL,
    NEW_TOKENS,
    generate_together,
    greedy,
    pass_on_the_softcap,
    reference_logits,
    sequence_of,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", CASES)
def test_logits_and_greedy_tokens_equal_those_of_transformers(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    case = CASES[name]
    pass_on_the_softcap(monkeypatch, case.text.get("attn_logit_softcapping"))
    reference = write_random_checkpoint(tmp_path, text=case.text, vision=case.vision, seed=len(name))
    driver = Driver(tmp_path)
    generator = torch.Generator().manual_seed(1)
    size = driver.config.vision.image_size if driver.config.vision else 0
    sequences = [sequence_of(prompt, size, generator) for prompt in case.prompts]
    prompt_lengths = [len(s.ids) for s in sequences]

    logits = generate_together(driver, sequences, chunk=case.chunk)

    for sequence, prompt_length, ours in zip(sequences, prompt_lengths, logits, strict=True):
        theirs = reference_logits(reference, sequence)[:-1]
        assert relative_error(ours, theirs) < 1e-5
        tokens = greedy(theirs[prompt_length - 1 :])
        assert tokens.tolist() == sequence.ids[prompt_length:]
        assert len(set(tokens.tolist())) > NEW_TOKENS // 16, "an answer that repeats itself shows little"


@pytest.mark.parametrize(
    ("text", "prompt"),
    [({"sliding_window": 10}, (40,)), ({"layer_types": [LOCAL, GLOBAL] * 2}, (8, IMAGE, 12, IMAGE, 4))],
    ids=["text, window shorter than the prompt", "two images"],
)
def test_answers_equal_those_of_transformers_generate(
    text: dict[str, Any], prompt: tuple[int | str, ...], tmp_path: Path
) -> None:
    reference = write_random_checkpoint(tmp_path, text=text, vision={}, seed=5)
    driver = Driver(tmp_path)
    sequence = sequence_of(prompt, VISION["image_size"], torch.Generator().manual_seed(2))
    ids = torch.tensor([sequence.ids])
    pictures = {"pixel_values": torch.stack([p for _, p in sequence.images])} if sequence.images else {}
    answer = reference.generate(
        input_ids=ids,
        token_type_ids=(ids == IMAGE_TOKEN).long(),
        **pictures,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=None,
        suppress_tokens=list(range(FIRST_TEXT_TOKEN)),
    )
    generate_together(driver, [sequence], chunk=1000)
    assert sequence.ids == answer[0].tolist()
    assert len(set(answer[0, ids.shape[1] :].tolist())) > NEW_TOKENS // 16, "an answer that repeats itself shows little"


def test_a_head_tied_to_the_embedding(tmp_path: Path) -> None:
    reference = write_random_checkpoint(tmp_path, text={"tie_word_embeddings": True}, vision={})
    sequence = sequence_of((20, IMAGE, 9), VISION["image_size"], torch.Generator().manual_seed(6))
    (logits,) = Driver(tmp_path).step([(sequence, len(sequence.ids))])
    assert relative_error(logits, reference_logits(reference, sequence)) < 1e-5


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.05), (torch.float16, 0.006)])
def test_half_precision_is_near_float32(dtype: torch.dtype, tolerance: float, tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path, text=FIVE_TO_ONE, vision={}, seed=3)
    prompts = ((20, IMAGE, 30), (50,))

    def logits(dtype: torch.dtype) -> list[Tensor]:
        generator = torch.Generator().manual_seed(4)
        sequences = [sequence_of(prompt, VISION["image_size"], generator) for prompt in prompts]
        return Driver(tmp_path, dtype=dtype).step([(s, len(s.ids)) for s in sequences])

    for half, full in zip(logits(dtype), logits(torch.float32), strict=True):
        assert half.dtype == torch.float32
        assert 0 < relative_error(half, full) < tolerance
