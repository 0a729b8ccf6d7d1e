"""The demo model's tokenizer: trained here, written in the files of a Gemma-3 checkpoint, and a fast encoder for it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from random import Random

import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from scripts.demo_data import texts
from scripts.demo_data.conversation import Split
from scripts.demo_data.skills import draw_conversation, draw_needles
from scripts.demo_data.words import GIVEN_NAMES, SURNAMES

PAD, EOS, BOS, UNK, MASK = 0, 1, 2, 3, 4
CONTROL = ("<pad>", "<eos>", "<bos>", "<unk>")
MARKS = ("<mask>", "<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>", "<image_soft_token>")
START_OF_TURN, END_OF_TURN, START_OF_IMAGE, END_OF_IMAGE, IMAGE_SOFT_TOKEN = range(5, 10)
LINE_BREAKS = ("\n", "\n\n")
VOCABULARY = 2048

UNITS = re.compile(r" ?[A-Za-z]+|\n+|[\s\S]")
"""No piece of the vocabulary reaches across these units, so they can be encoded one by one and remembered."""

MOST_KNOWN_UNITS = 500_000

UNIT_BORDER = "\x01"
CHAT_TEMPLATE = (Path(__file__).parent / "chat_template.jinja").read_text(encoding="utf-8")


def training_text(conversations: int, *, seed: int) -> Iterator[str]:
    """Lines of what the skills say, unit borders marked, and every single character they may use."""
    rng = Random(seed)
    for index in range(conversations):
        conversation = (
            draw_needles(rng, Split.TRAIN, tokens=1024)
            if index % 4 == 0
            else draw_conversation(rng, Split.TRAIN, longest_list=256)
        )
        for turn in conversation.turns:
            for text in (*(part for part in turn.question if isinstance(part, str)), turn.answer):
                for line in text.split("\n"):
                    # Unicode outside the Chinese of the skills is left to byte fallback.
                    if line and not turn.skill.startswith("repeat"):
                        yield UNIT_BORDER.join(UNITS.findall(line))
    yield from texts.SYMBOLS + texts.LETTERS + texts.LETTERS.upper() + SURNAMES + GIVEN_NAMES


def train_tokenizer(folder: Path, *, conversations: int = 30_000, seed: int = 1) -> None:
    """Trains `tokenizer.model` and writes `tokenizer.json` with the same ids beside it."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=training_text(conversations, seed=seed),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=VOCABULARY,
        byte_fallback=True,
        split_digits=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        character_coverage=1.0,
        pretokenization_delimiter=UNIT_BORDER,
        pad_id=PAD,
        eos_id=EOS,
        bos_id=BOS,
        unk_id=UNK,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        unk_piece="<unk>",
        user_defined_symbols=[*MARKS, *LINE_BREAKS],
        max_sentence_length=1 << 20,
        num_threads=2,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    fast_tokenizer(folder / "tokenizer.model").save(str(folder / "tokenizer.json"))


def fast_tokenizer(model: Path) -> Tokenizer:
    """The `tokenizers` twin of a SentencePiece BPE model, built like Gemma's own tokenizer.json."""
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(model))
    vocabulary = {pieces.id_to_piece(index): index for index in range(pieces.get_piece_size())}
    normal = {
        piece: index
        for piece, index in vocabulary.items()
        if not (pieces.is_control(index) or pieces.is_unknown(index) or pieces.is_byte(index)) and piece not in MARKS
    }
    merges = [
        (piece[:cut], piece[cut:])
        for piece, _ in sorted(normal.items(), key=lambda item: item[1])
        for cut in range(1, len(piece))
        if piece[:cut] in normal and piece[cut:] in normal
    ]
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", BOS)]
    )
    tokenizer.add_special_tokens([AddedToken(mark, normalized=False) for mark in (*CONTROL, *MARKS)])
    return tokenizer


def write_tokenizer_settings(folder: Path) -> None:
    """Writes the small files beside the tokenizer: its config, special tokens and chat template."""
    names = {
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "mask_token": "<mask>",
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
        "image_token": "<image_soft_token>",
    }
    extra = {key: names[key] for key in ("boi_token", "eoi_token", "image_token")}
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": {
            str(index): {
                "content": mark,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": True,
            }
            for index, mark in enumerate((*CONTROL, *MARKS))
        },
        **names,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "extra_special_tokens": extra,
        "model_max_length": 32768,
        "padding_side": "left",
        "processor_class": "Gemma3Processor",
        "tokenizer_class": "GemmaTokenizer",
        "use_default_system_prompt": False,
    }
    _write_json(folder / "tokenizer_config.json", config)
    _write_json(folder / "special_tokens_map.json", names)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


class UnitEncoder:
    """Encodes plain text to the same ids as the tokenizer, many times faster on text whose units repeat."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: dict[str, list[int]] = {}

    @classmethod
    def load(cls, folder: Path) -> UnitEncoder:
        return cls(Tokenizer.from_file(str(folder / "tokenizer.json")))

    def encode(self, text: str) -> list[int]:
        """Token ids without <bos>."""
        ids: list[int] = []
        known = self._known
        for unit in UNITS.findall(text):
            found = known.get(unit)
            if found is None:
                if len(known) >= MOST_KNOWN_UNITS:
                    known.clear()
                found = self._tokenizer.encode(unit, add_special_tokens=False).ids
                known[unit] = found
            ids += found
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        return str(self._tokenizer.decode(list(ids)))
