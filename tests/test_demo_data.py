"""The demo model's data: right answers, a clean split, real tokens, and streams that its twin reads as Gemma-3 does."""

from __future__ import annotations

from pathlib import Path
from random import Random

import numpy as np
import pytest
import sentencepiece
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer
from transformers import AutoProcessor, Gemma3Config, Gemma3ForConditionalGeneration

from scripts.demo_data import facts, pictures, texts
from scripts.demo_data import tokenizer as tok
from scripts.demo_data.conversation import Conversation, Request, Split
from scripts.demo_data.drawing import draw_picture, encode_picture
from scripts.demo_data.model import SMALL, Stream, Twin, dense_attend, gemma3_config
from scripts.demo_data.packing import Packer, encode_conversation, training_pack
from scripts.demo_data.phrases import CHOICE, DESCRIBE, phrase
from scripts.demo_data.rendering import cell_labels, render, scene_parameters
from scripts.demo_data.skills import SKILLS, draw_conversation
from scripts.demo_data.tokenizer import UnitEncoder
from scripts.demo_data.words import COLOURS, LANGUAGES, SHAPES
from scripts.train_demo import BLOCK, SparseMasks

CHECKPOINT = Path(__file__).resolve().parents[1] / "models" / "wicore-demo"


@pytest.fixture(scope="module")
def encoder() -> UnitEncoder:
    return UnitEncoder.load(CHECKPOINT)


def request(seed: int, *, language: str = "en", split: Split = Split.TRAIN, tokens: int = 256) -> Request:
    return Request(Random(seed), "zh" if language == "zh" else "en", split, tokens=tokens)


# ---- answers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(40))
def test_sums_are_right(seed):
    for turn in texts.sums(request(seed)):
        numbers = "".join(c if c.isdigit() else " " for c in turn.question[0]).split()
        a, b = map(int, numbers)
        kind = turn.skill.split("/")[1]
        assert int(turn.answer) == {"add": a + b, "subtract": a - b, "multiply": a * b}[kind]


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("seed", range(20))
def test_a_fact_is_stated_once_and_answers_its_question(language, seed):
    turns = facts.needles(request(seed, language=language, tokens=800), facts_share=1.0, questions=3)
    listing = turns[0].question[0]
    for turn in turns:
        assert turn.answer in listing
    statements = [line for line in listing.splitlines() if line]
    assert len(statements) == len(set(statements))


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_a_needle_stands_at_the_depth_asked_for(depth):
    for seed in range(10):
        turn = facts.needles(request(seed, tokens=2000), depth=depth, facts_share=1.0, questions=1)[0]
        text = turn.question[0]
        numbers = [place for place in range(len(text)) if text.startswith(turn.answer, place)]
        assert any(abs(place / len(text) - depth) < 0.1 for place in numbers)


@pytest.mark.parametrize("seed", range(20))
def test_reversing_twice_gives_the_text_back(seed):
    for turn in texts.reverse(request(seed)):
        asked = turn.question[0].rpartition(": ")[2]
        answer = turn.answer.split(" ") if "words" in turn.skill else list(turn.answer)
        assert (" " if "words" in turn.skill else "").join(reversed(answer)) == asked


def test_a_plain_picture_is_described_by_its_colour():
    scene = pictures.draw_scene(Random(0), Split.TRAIN, things=0)
    colour = COLOURS[scene.background].name
    assert pictures.describe(scene, "en") == f"This is a plain {colour.en} picture."
    assert pictures.describe(scene, "zh") == f"这是一张纯{colour.zh}的图片。"


@pytest.mark.parametrize("seed", range(30))
def test_a_description_names_everything_in_the_scene(seed):
    scene = pictures.draw_scene(Random(seed), Split.TRAIN, things=1 + seed % 5)
    english, chinese = pictures.describe(scene, "en"), pictures.describe(scene, "zh")
    assert f" {len(scene.things)} thing" in english
    assert f"有{len(scene.things)}个东西" in chinese
    for thing in scene.things:
        assert thing.name("en") in english
        assert thing.name("zh") in chinese
    assert len({thing.cell for thing in scene.things}) == len(scene.things)


# ---- the split ------------------------------------------------------------------------------------------------------


def test_every_combination_belongs_to_exactly_one_split():
    held_out = 0
    for a in range(100):
        for b in range(100):
            belongs = [split.admits("sum", a, "+", b) for split in Split]
            assert sum(belongs) == 1
            held_out += Split.HELD_OUT.admits("sum", a, "+", b)
    assert 800 < held_out < 1200


def test_training_and_held_out_pictures_share_no_combination():
    def combinations(split):
        scenes = [pictures.draw_scene(Random(seed), split) for seed in range(300)]
        return {(thing.colour, thing.shape, thing.cell) for scene in scenes for thing in scene.things}

    assert not combinations(Split.TRAIN) & combinations(Split.HELD_OUT)


@pytest.mark.parametrize("language", LANGUAGES)
def test_training_and_held_out_facts_share_no_name(language):
    def names(split):
        rng = Random(3)
        return {facts.draw_name(rng, split, language) for _ in range(2000)}

    assert not names(Split.TRAIN) & names(Split.HELD_OUT)


# ---- words ----------------------------------------------------------------------------------------------------------


@given(st.text(max_size=40), st.integers())
@settings(max_examples=100, deadline=None)
def test_what_fills_a_slot_is_never_taken_for_a_choice(text, seed):
    patterns = {"en": ("[Repeat|Say]: {text}",), "zh": ("[重复|说]：{text}",)}
    assert phrase(Random(seed), patterns, "en", text=text).endswith(": " + text)


def test_descriptions_are_asked_for_in_many_ways():
    for language in LANGUAGES:
        asked = {phrase(Random(seed), DESCRIBE, language) for seed in range(500)}
        assert len(asked) > 200
        assert not any(CHOICE.search(question) for question in asked)


# ---- tokens ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizers():
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(CHECKPOINT / "tokenizer.model"))
    return pieces, Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))


@given(st.text(max_size=80))
@settings(max_examples=300, deadline=None)
def test_unit_encoder_tokenizer_json_and_sentencepiece_agree_on_any_text(tokenizers, encoder, text):
    pieces, fast = tokenizers
    if any(mark in text for mark in (*tok.CONTROL, *tok.MARKS)) or "\0" in text or "▁" in text:
        return
    expected = pieces.encode(text)
    assert fast.encode(text, add_special_tokens=False).ids == expected
    assert encoder.encode(text) == expected


def test_special_tokens_have_the_ids_that_the_config_names():
    fast = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    config = Gemma3Config.from_pretrained(CHECKPOINT)
    assert fast.token_to_id("<image_soft_token>") == config.image_token_index
    assert fast.token_to_id("<start_of_image>") == config.boi_token_index
    assert fast.token_to_id("<end_of_image>") == config.eoi_token_index
    assert config.eos_token_id == [fast.token_to_id("<eos>"), fast.token_to_id("<end_of_turn>")]
    assert fast.get_vocab_size() == config.text_config.vocab_size


def test_checkpoint_loads_whole_and_is_small(caplog, recwarn):
    model, loading = Gemma3ForConditionalGeneration.from_pretrained(CHECKPOINT, output_loading_info=True)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.dtype is torch.bfloat16
    assert not caplog.records
    assert not recwarn.list
    assert sum(file.stat().st_size for file in CHECKPOINT.iterdir()) < 24e6


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(CHECKPOINT)


@pytest.mark.parametrize("seed", range(25))
def test_conversations_encode_as_chat_template_and_processor_do(processor, encoder, seed):
    conversation = draw_conversation(Random(seed), Split.TRAIN, longest_list=300)
    encoded = encode_conversation(conversation, encoder, image_tokens=64)
    last = len(conversation.turns) - 1
    text = processor.apply_chat_template(conversation.messages(up_to=last), add_generation_prompt=True, tokenize=False)
    blank = [Image.new("RGB", (8, 8)) for _ in conversation.pictures(up_to=last)]
    ids = processor(text=text, images=[blank] if blank else None, add_special_tokens=False)["input_ids"][0]
    first, end, _ = encoded.answers[last]
    assert list(ids) == encoded.ids[:first]
    assert encoder.decode(encoded.ids[first : end - 1]) == conversation.turns[last].answer
    assert encoded.ids[end - 1] == tok.END_OF_TURN


# ---- pictures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", range(len(SHAPES)), ids=[shape.en for shape in SHAPES])
def test_rendered_and_drawn_pictures_are_the_same(shape):
    thing = pictures.Thing(shape, 0, 4, 0.5, 0.5, 0.3, 7.0, (255, 0, 0))
    scene = pictures.Scene(320, 240, 10, (255, 255, 255), (thing,), 0.0)
    rendered = render(*scene_parameters([scene], softness=[1.0]), side=224)[0].float().permute(1, 2, 0).numpy()
    drawn = np.asarray(draw_picture(scene).resize((224, 224), Image.Resampling.BILINEAR)) / 127.5 - 1
    assert np.abs(rendered - drawn).mean() < 0.01


def test_labels_say_what_stands_in_the_middle_of_a_cell():
    thing = pictures.Thing(0, 5, 4, 0.5, 0.5, 0.3, 0.0, (0, 0, 255))
    scene = pictures.Scene(896, 896, 10, (255, 255, 255), (thing,), 0.0)
    shape, colour = (labels.view(8, 8) for labels in cell_labels(*scene_parameters([scene], softness=[1.0]), side=8))
    assert shape[4, 4] == 0
    assert colour[4, 4] == 5
    assert shape[0, 0] == len(SHAPES)
    assert colour[0, 0] == 10


def test_pictures_become_files_that_open():
    scene = pictures.draw_scene(Random(2), Split.HELD_OUT, things=3)
    heads = {encode_picture(scene, Random(seed))[:2] for seed in range(8)}
    assert heads == {b"\x89P", b"\xff\xd8"}


# ---- packs and the twin ---------------------------------------------------------------------------------------------


def small_pack(encoder: UnitEncoder, *, tokens: int, seed: int):
    packer = Packer(encoder, tokens=tokens, pictures=4, image_tokens=SMALL.image_tokens)
    return training_pack(packer, Random(seed), Split.TRAIN, longest=tokens // 2)


def test_answers_of_a_pack_are_the_tokens_that_follow_their_rows(encoder):
    pack = small_pack(encoder, tokens=4096, seed=1)
    used = pack.turns >= 0
    assert used.any()
    assert torch.equal(pack.ids[pack.answer_rows[used] + 1], pack.targets[used])
    assert (pack.weights[~used] == 0).all()
    ends = [pack.targets[pack.turns == turn][-1].item() for turn in range(len(pack.skills))]
    assert ends == [tok.END_OF_TURN] * len(pack.skills)


@pytest.mark.parametrize("seed", range(3))
def test_twin_computes_what_transformers_computes(encoder, seed):
    torch.manual_seed(seed)
    twin = Twin(SMALL).eval()
    reference = Gemma3ForConditionalGeneration(Gemma3Config(**gemma3_config(SMALL))).float().eval()
    missing, unexpected = reference.load_state_dict(twin.state_dict(), strict=False)
    assert set(missing) <= {"lm_head.weight"}
    assert not unexpected
    reference.tie_weights()
    pack = small_pack(encoder, tokens=1024, seed=seed)
    pixels = render(pack.scenes, pack.things, side=SMALL.image_size).float()
    rows = torch.arange(1024)
    stream = Stream(pack.ids, pack.positions, pack.starts, pack.limits, pack.picture_rows, rows)
    with torch.no_grad():
        logits, _ = twin(stream, pixels, dense_attend(stream, SMALL.window))
    seen = 0
    for start in pack.starts.unique().tolist():
        span = (pack.starts == start).nonzero()[:, 0]
        if len(span) == 1:
            continue  # padding
        ids = pack.ids[span][None]
        is_image = ids == tok.IMAGE_SOFT_TOKEN
        count = int(is_image.sum()) // SMALL.image_tokens
        images = {"pixel_values": pixels[seen : seen + count]} if count else {}
        seen += count
        with torch.no_grad():
            expected = reference(input_ids=ids, token_type_ids=is_image.long(), **images).logits[0]
        assert (logits[span] - expected).norm() / expected.norm() < 1e-5


@pytest.mark.parametrize("seed", range(3))
def test_sparse_masks_cover_what_is_visible_and_nothing_else_as_full(encoder, seed):
    tokens, window = 2048, 300
    pack = small_pack(encoder, tokens=tokens, seed=seed)
    rows = torch.arange(tokens)
    masks = SparseMasks(tokens, window, torch.device("cpu")).update(pack.starts, pack.limits)
    for is_global, mask in zip((True, False), masks, strict=True):
        visible = (rows >= pack.starts[:, None]) & (rows <= pack.limits[:, None])
        if not is_global:
            visible &= rows > rows[:, None] - window
        blocks = visible.view(tokens // BLOCK, BLOCK, tokens // BLOCK, BLOCK)
        partial = _blocks(mask.kv_num_blocks, mask.kv_indices)
        full = _blocks(mask.full_kv_num_blocks, mask.full_kv_indices)
        assert not (blocks.any(3).any(1) & ~(partial | full)).any()
        assert not (full & ~blocks.all(3).all(1)).any()


def _blocks(counts: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    listed = torch.zeros(indices.shape[2:], dtype=torch.bool)
    for row, (count, columns) in enumerate(zip(counts[0, 0], indices[0, 0], strict=True)):
        listed[row, columns[:count].long()] = True
    return listed


@pytest.mark.parametrize("skill", SKILLS, ids=lambda skill: skill.name)
def test_every_skill_asks_in_both_languages(skill):
    for language in LANGUAGES:
        turns = [turn for seed in range(20) for turn in skill.turns(request(seed, language=language, tokens=200))]
        assert turns
        for turn in turns:
            assert turn.skill.endswith("/" + language)
            assert turn.answer == turn.answer.strip() != ""
            for part in turn.question:
                assert not isinstance(part, str) or part == part.strip() != ""


def test_messages_carry_system_pictures_and_earlier_answers():
    turns = tuple(pictures.about_one(request(5)) + texts.sums(request(6)))
    messages = Conversation(turns, system="Answer briefly.").messages(up_to=1)
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user"]
    assert {"type": "image"} in messages[1]["content"]
    assert messages[2]["content"] == [{"type": "text", "text": turns[0].answer}]
