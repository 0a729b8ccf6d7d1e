"""What is set aside for CUDA graphs grows with what they are recorded for, and is no more than a card can spare."""

from pathlib import Path

import pytest

from wicore_backend.engine.graph_memory import graph_bytes
from wicore_backend.models.gemma3.config import Gemma3Config

CONFIG = Gemma3Config.from_checkpoint(Path(__file__).resolve().parent.parent / "models" / "wicore-demo")


def taken(max_running=64, max_batch_tokens=512, value_bytes=2):
    return graph_bytes(CONFIG.text, max_running=max_running, max_batch_tokens=max_batch_tokens, value_bytes=value_bytes)


def test_more_sequences_more_tokens_and_wider_values_take_more():
    assert taken() < taken(max_running=65) < taken(max_running=256)
    assert taken() < taken(max_batch_tokens=640)
    assert taken() < taken(value_bytes=4)


def test_logits_of_every_sequence_find_room():
    of_one = CONFIG.text.vocab_size * 6  # float32, and the product that they are rounded from
    assert taken(max_running=3000) - taken(max_running=2000) >= 1000 * of_one


def test_steps_too_long_for_a_graph_take_nothing():
    assert taken(max_batch_tokens=1024) == taken(max_batch_tokens=8192)


@pytest.mark.parametrize("max_running", [1, 64])
def test_a_small_model_takes_little(max_running):
    assert taken(max_running=max_running) < 2**29
