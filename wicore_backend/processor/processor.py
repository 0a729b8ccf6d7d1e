"""What a client sends, text and images, to what the engine reads: a `Prompt`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray

from wicore_backend.errors import CheckpointError, InvalidArgumentError
from wicore_backend.processor.chat_template import ChatTemplate
from wicore_backend.processor.checkpoint_files import read_json_if_present
from wicore_backend.processor.control_tokens import ControlTokenGuard
from wicore_backend.processor.image_decoding import ImageSource, load_rgb, read_image_file
from wicore_backend.processor.images import ImageConfig, PixelNormalization, digest, pan_and_scan, resize
from wicore_backend.processor.limits import DEFAULT_LIMITS, PromptLimits
from wicore_backend.processor.messages import ChatMessage, ImagePart, TextPart, parse_messages
from wicore_backend.processor.prompt import Prompt, PromptImage
from wicore_backend.processor.tokenizer import Tokenizer

__all__ = ["ImageSource", "Processor", "PromptLimits", "PromptSource"]

PromptSource: TypeAlias = str | Sequence[Mapping[str, Any]] | Sequence[int] | NDArray[np.integer[Any]]
"""A question, chat messages, or token ids."""

DEFAULT_IMAGE_SEQ_LENGTH = 256
"""Soft tokens of an image where processor_config.json does not say (Gemma3Processor of transformers)."""


class Processor:
    """Tokenizer, chat template and image settings of one checkpoint. Safe to share between threads.

    Attributes
    ----------
    tokenizer
        The checkpoint's tokenizer.
    limits
        What a prompt may ask for.
    image_size
        Height and width of a prompt's pixels; None if the model reads text only.
    soft_tokens_per_image
        Tokens that one image (or pan-and-scan crop) takes in a prompt; None if the model reads text only.
    normalization
        What makes the float form of a prompt's pixels.
    """

    def __init__(
        self,
        *,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        image_config: ImageConfig | None,
        soft_tokens_per_image: int,
        vocab_size: int,
        limits: PromptLimits,
    ) -> None:
        self.tokenizer = tokenizer
        self.limits = limits
        self.image_size = None if image_config is None else image_config.size
        self.soft_tokens_per_image = None if image_config is None else soft_tokens_per_image
        self.normalization = (
            PixelNormalization() if image_config is None else PixelNormalization.from_config(image_config)
        )
        self._template = template
        self._vocab_size = vocab_size
        self._images = None if image_config is None else _ImageWriter(image_config, soft_tokens_per_image, tokenizer)
        self._control_tokens = _control_tokens(tokenizer, template)

    @classmethod
    def from_checkpoint(
        cls, directory: Path, *, limits: PromptLimits = DEFAULT_LIMITS, do_pan_and_scan: bool | None = None
    ) -> Self:
        """The processor of a checkpoint in Hugging Face layout.

        Parameters
        ----------
        directory
            Where the checkpoint's files are.
        limits
            What a prompt may ask for.
        do_pan_and_scan
            Whether long pictures come with crops of their parts; None leaves it to preprocessor_config.json.

        Raises
        ------
        CheckpointError
            A file is missing, damaged, or contradicts another.
        """
        tokenizer = Tokenizer.from_checkpoint(directory)
        image_config = ImageConfig.from_checkpoint(directory)
        if image_config is not None and do_pan_and_scan is not None:
            image_config = image_config.model_copy(update={"do_pan_and_scan": do_pan_and_scan})
        soft_tokens = read_json_if_present(directory / "processor_config.json").get("image_seq_length")
        soft_tokens = DEFAULT_IMAGE_SEQ_LENGTH if soft_tokens is None else soft_tokens
        if not isinstance(soft_tokens, int) or soft_tokens < 1:
            raise CheckpointError(f"{directory}/processor_config.json: image_seq_length is {soft_tokens!r}")
        model_config = read_json_if_present(directory / "config.json")
        if image_config is not None:
            _check_agreement(model_config, image_config, soft_tokens, tokenizer)
        vocab_size = _section(model_config, "text_config").get("vocab_size", model_config.get("vocab_size", 0))
        if not isinstance(vocab_size, int):
            raise CheckpointError(f"{directory}/config.json: vocab_size is {vocab_size!r}")
        return cls(
            tokenizer=tokenizer,
            template=ChatTemplate.from_checkpoint(directory, variables=tokenizer.names),
            image_config=image_config,
            soft_tokens_per_image=soft_tokens,
            vocab_size=max(tokenizer.vocab_size, vocab_size),
            limits=limits,
        )

    def read_image(self, path: Path) -> bytes:
        """An image file of this machine, to be given to `process`. Never call it with a path from outside."""
        return read_image_file(path, limits=self.limits)

    def process(self, source: PromptSource, *, images: Sequence[ImageSource] = (), raw: bool = False) -> Prompt:
        """The prompt that the engine reads.

        Parameters
        ----------
        source
            A question: one user turn of the chat template, its images before its text. Or chat messages
            (`messages.parse_messages` has their form), where `images` fill the image parts that have none, in order.
            Or token ids, taken as they are, without images.
        images
            PNG, JPEG, WebP or GIF files as bytes, base64 text or data URL; PIL images; uint8 [H, W, 3].
        raw
            The text is the whole prompt: no template, special tokens in it count, `<start_of_image>` stands where an
            image goes, and BOS goes before it unless the text begins with it.

        Raises
        ------
        InvalidArgumentError
            The prompt is empty, malformed, or over one of the limits.
        """
        if isinstance(images, str | bytes):
            raise InvalidArgumentError(f"images is a {type(images).__name__}; it takes a list of images")
        if isinstance(source, str):
            _check_not_empty([source], image_count=len(images))
            if raw:
                self._check_text_length([source])
                return self._prompt([source], self._load(images))
            places = tuple(ImagePart(None) for _ in images)
            return self._chat([ChatMessage("user", (*places, TextPart(source)))], images=images)
        if raw:
            raise InvalidArgumentError("raw is for a prompt that is a text; leave it out for messages and token ids")
        if not isinstance(source, Sequence | np.ndarray) or isinstance(source, bytes):
            raise InvalidArgumentError(
                f"the prompt is a {type(source).__name__}; it takes a text, messages or token ids"
            )
        if isinstance(source, np.ndarray) or (len(source) > 0 and isinstance(source[0], int | np.integer)):
            if len(images) > 0:
                raise InvalidArgumentError("a prompt of token ids takes no images; send a text or messages")
            return self._from_token_ids(source)
        self._check_token_count(len(source))  # before they are parsed; each is one token at the very least
        return self._chat(parse_messages(source), images=images)  # type: ignore[arg-type]

    def _from_token_ids(self, source: Any) -> Prompt:
        try:
            ids = np.asarray(source)
        except ValueError:  # a list of lists of different lengths
            raise InvalidArgumentError("token ids are a list of unlike things; they must be integers [T]") from None
        if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
            raise InvalidArgumentError(f"token ids are {ids.dtype} {list(ids.shape)}; they must be integers [T]")
        if len(ids) == 0:
            raise InvalidArgumentError("the prompt is empty; send at least one token")
        self._check_token_count(len(ids))
        if ids.min() < 0 or ids.max() >= self._vocab_size:
            seen = ids[(ids < 0) | (ids >= self._vocab_size)][0]
            raise InvalidArgumentError(f"token id {seen} is not in the vocabulary, 0 to {self._vocab_size - 1}")
        if self._images is not None and self._images.soft_token_id in ids:
            raise InvalidArgumentError(
                f"token ids hold the image token {self._images.soft_token_id}, but come without images; "
                "send a text or messages"
            )
        return Prompt(ids.astype(np.int32))

    def _chat(self, messages: Sequence[ChatMessage], *, images: Sequence[ImageSource]) -> Prompt:
        if self._template is None:
            raise InvalidArgumentError("this checkpoint has no chat template; send a text with raw=true")
        texts = [text for message in messages for text in message.texts]
        parts = [part for message in messages for part in message.images]
        _check_not_empty(texts, image_count=len(parts))
        self._check_text_length(texts)
        sources = _sources(parts, images)
        guard = ControlTokenGuard(self._control_tokens, texts)
        rendered = self._template.render([_for_template(message, guard) for message in messages])
        return self._prompt(guard.segments(rendered), self._load(sources))

    def _load(self, images: Sequence[ImageSource]) -> list[list[NDArray[np.uint8]]]:
        """For each image its pixels and those of its crops."""
        if len(images) == 0:
            return []
        if self._images is None:
            raise InvalidArgumentError(f"the prompt has {len(images)} image(s), but this model reads text only")
        if len(images) > self.limits.max_images:
            raise InvalidArgumentError(
                f"the prompt has {len(images)} images, over the limit of {self.limits.max_images} (max_images); "
                "send fewer, or in several requests"
            )
        self._check_token_count(len(images) * self._images.soft_tokens)
        return [
            self._images.views(image, name=f"images[{index}]", limits=self.limits) for index, image in enumerate(images)
        ]

    def _prompt(self, segments: Sequence[str], images: Sequence[Sequence[NDArray[np.uint8]]]) -> Prompt:
        """The prompt of a text, cut where tokens must not reach across, and its images' views."""
        if self._images is not None:
            segments = self._images.write(segments, [len(views) for views in images])
        bos = self.tokenizer.names["bos_token"]
        ids = [self.tokenizer.bos_id] if self.tokenizer.adds_bos and not segments[0].startswith(bos) else []
        for segment in segments:
            ids.extend(self.tokenizer.encode(segment))
        token_ids = np.array(ids, dtype=np.int32)
        if self._images is None:
            self._check_token_count(len(token_ids))
            return Prompt(token_ids)
        views = [pixels for image in images for pixels in image]
        self._check_token_count(len(token_ids) + len(views) * (self._images.soft_tokens - 1))
        return self._images.place(token_ids, views)

    def _check_text_length(self, texts: Iterable[str]) -> None:
        """Refuses what cannot fit before it is tokenized: a token is at most `longest_piece` characters."""
        characters = sum(len(text.strip()) for text in texts)
        self._check_token_count(math.ceil(characters / self.tokenizer.longest_piece), bound="at least ")

    def _check_token_count(self, count: int, *, bound: str = "") -> None:
        if count > self.limits.max_prompt_tokens:
            raise InvalidArgumentError(
                f"the prompt has {bound}{count} tokens, over the limit of {self.limits.max_prompt_tokens} "
                "(max_prompt_tokens); shorten the text or send fewer images"
            )


class _ImageWriter:
    """Pictures to pixels, and image places in a text to soft tokens, as transformers' Gemma3Processor does both."""

    def __init__(self, config: ImageConfig, soft_tokens: int, tokenizer: Tokenizer) -> None:
        self.soft_tokens = soft_tokens
        self.soft_token_id = tokenizer.named_id("image_token")
        self._config = config
        self._soft_token = tokenizer.names["image_token"]
        self._place = tokenizer.names["boi_token"]
        tokenizer.named_id("boi_token")
        tokenizer.named_id("eoi_token")
        # One soft token here stands for all of an image's: `place` repeats it after tokenizing.
        self._written = f"\n\n{self._place}{self._soft_token}{tokenizer.names['eoi_token']}\n\n"

    def views(self, source: ImageSource, *, name: str, limits: PromptLimits) -> list[NDArray[np.uint8]]:
        """The picture's pixels uint8 [3, S, S], followed by those of its crops."""
        picture = load_rgb(source, name=name, limits=limits)
        crops = pan_and_scan(picture, self._config) if self._config.do_pan_and_scan else []
        return [resize(view, self._config) for view in (picture, *crops)]

    def write(self, segments: Sequence[str], view_counts: Sequence[int]) -> list[str]:
        """The text with each image place written out, the n-th for an image of `view_counts[n]` views."""
        if any(self._soft_token in segment for segment in segments):
            raise InvalidArgumentError(f"the text contains {self._soft_token}; write {self._place} where an image goes")
        places = sum(segment.count(self._place) for segment in segments)
        if places != len(view_counts):
            raise InvalidArgumentError(
                f"the text has {places} image place(s) {self._place}, but the prompt has {len(view_counts)} image(s); "
                "there must be one place for each"
            )
        counts = iter(view_counts)
        return [_replace_each(segment, self._place, lambda: self._text_of(next(counts))) for segment in segments]

    def place(self, token_ids: NDArray[np.int32], views: Sequence[NDArray[np.uint8]]) -> Prompt:
        """The prompt, each soft token repeated for its view's whole span."""
        positions = np.flatnonzero(token_ids == self.soft_token_id)
        repeats = np.ones(len(token_ids), dtype=np.intp)
        repeats[positions] = self.soft_tokens
        starts = positions + np.arange(len(positions)) * (self.soft_tokens - 1)
        images = tuple(
            PromptImage(start=int(start), length=self.soft_tokens, pixels=pixels, digest=digest(pixels))
            for start, pixels in zip(starts, views, strict=True)
        )
        return Prompt(np.repeat(token_ids, repeats), images)

    def _text_of(self, view_count: int) -> str:
        if view_count == 1:
            return self._written
        crops = " ".join([self._written] * (view_count - 1))
        return f"Here is the original image {self._written} and here are some crops to help you see better {crops}"


def _control_tokens(tokenizer: Tokenizer, template: ChatTemplate | None) -> list[str]:
    """What users' texts must not act as: special tokens, and added tokens that the template itself writes.

    Added tokens of whitespace alone (Gemma has them for runs of line breaks) are text wherever they stand.
    """
    source = "" if template is None else template.source
    written = [token for token in tokenizer.added_tokens if token in source and not token.isspace()]
    return sorted({*tokenizer.special_tokens, *written})


def _for_template(message: ChatMessage, guard: ControlTokenGuard) -> dict[str, Any]:
    if isinstance(message.content, str):
        return {"role": message.role, "content": guard.protect(message.content)}
    parts = [
        {"type": "text", "text": guard.protect(part.text)} if isinstance(part, TextPart) else {"type": "image"}
        for part in message.content
    ]
    return {"role": message.role, "content": parts}


def _sources(parts: Sequence[ImagePart], images: Sequence[ImageSource]) -> list[ImageSource]:
    """The images of a conversation in order: those that came in messages, and between them those beside."""
    places = sum(part.source is None for part in parts)
    if places != len(images):
        raise InvalidArgumentError(
            f'the messages have {places} part(s) {{"type": "image"}}, but there are {len(images)} image(s) beside '
            "them; there must be one part for each"
        )
    beside = iter(images)
    return [next(beside) if part.source is None else part.source for part in parts]


def _check_not_empty(texts: Iterable[str], *, image_count: int) -> None:
    if image_count == 0 and not any(text.strip() for text in texts):
        raise InvalidArgumentError("the prompt is empty; send some text or an image")


def _replace_each(text: str, old: str, new: Any) -> str:
    """`text` with each `old` replaced by what a call of `new` gives, from left to right."""
    head, *rest = text.split(old)
    return head + "".join(new() + piece for piece in rest)


def _check_agreement(
    model_config: Mapping[str, Any], image_config: ImageConfig, soft_tokens: int, tokenizer: Tokenizer
) -> None:
    """CheckpointError if config.json and the processor's files describe different models."""
    vision = _section(model_config, "vision_config")
    pairs = {
        "vision_config.image_size": (vision.get("image_size"), image_config.size, "preprocessor_config.json"),
        "mm_tokens_per_image": (model_config.get("mm_tokens_per_image"), soft_tokens, "processor_config.json"),
        "image_token_index": (
            model_config.get("image_token_index", model_config.get("image_token_id")),
            tokenizer.named_id("image_token"),
            "the tokenizer",
        ),
    }
    for name, (seen, expected, file) in pairs.items():
        if seen is not None and seen != expected:
            raise CheckpointError(f"config.json has {name} = {seen}, but {file} says {expected}")


def _section(model_config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """An object within config.json, empty if it is absent."""
    section = model_config.get(name) or {}
    if not isinstance(section, dict):
        raise CheckpointError(f"config.json has {name} = {section!r} where an object is needed")
    return section
