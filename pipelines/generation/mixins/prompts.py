"""Prompts to embeddings, and to what the transformer's layers take."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, UMT5EncoderModel

from pipelines.generation.inputs.request import Prompts, Texts, as_list
from pipelines.generation.mixins.placement import PlacementMixin
from pipelines.prompts.files import check_prompt
from wan.text import TextEncoder
from wan.utils.errors import InputError
from wan.utils.ranges import typed


class PromptMixin(PlacementMixin):
    """Adds text encoding to a pipeline."""

    text_encoder: UMT5EncoderModel | None
    tokenizer: PreTrainedTokenizerBase | None
    _known_cuts: set[str]

    def encode_prompt(self, prompts: Prompts, max_sequence_length: int | None = None) -> Tensor:
        """Text embeddings [B, text_len, text_dim]; rows of padding are zero.

        Args:
            prompts: one, or one per video.
            max_sequence_length: tokens after which prompts are cut, text_len by default. The rest is padding, which
                Wan 2.1 attends to.

        Raises:
            InputError: a prompt is empty or no text, the text encoder was not loaded, or the model takes fewer tokens.
        """
        texts = as_list(prompts, "prompt")
        if not texts:
            raise InputError("there are no prompts: give at least one")
        for text in texts:
            check_prompt(text, "the prompt")
        self._check_length(max_sequence_length)
        return self._encode(texts, max_sequence_length)

    def _check_length(self, max_sequence_length: int | None) -> None:
        if max_sequence_length is None:
            return
        length, text_len = typed(int, max_sequence_length, "max_sequence_length"), self.transformer.config.text_len
        if not 2 <= length <= text_len:
            raise InputError(f"max_sequence_length {length} is out of range: give 2 to {text_len} tokens")

    def check_text(self, texts: Texts, max_sequence_length: int | None) -> None:
        """Make sure that texts can be encoded.

        Raises:
            InputError: they cannot.
        """
        self._check_length(max_sequence_length)
        for embeds in (texts.prompt_embeds, texts.negative_prompt_embeds):
            if embeds is not None:
                self.check_embeds(embeds)
        in_words = texts.prompts is not None or texts.negative_prompts is not None
        if in_words and (self.text_encoder is None or self.tokenizer is None):
            needed = "prompt_embeds and negative_prompt_embeds" if texts.is_guided else "prompt_embeds"
            raise InputError(f"this pipeline has no text encoder: pass {needed}")
        if max_sequence_length is not None and texts.prompts is None:
            raise InputError("max_sequence_length would do nothing to prompt_embeds: leave it out")

    def check_embeds(self, embeds_BTD: Tensor) -> None:
        """Make sure that the transformer takes text embeddings.

        Raises:
            InputError: another shape.
        """
        most, width = self.transformer.config.text_len, self.transformer.config.text_dim
        if embeds_BTD.ndim != 3 or embeds_BTD.shape[2] != width or not 1 <= embeds_BTD.shape[1] <= most:
            raise InputError(
                f"text embeddings have the shape {list(embeds_BTD.shape)}: give [videos, tokens, {width}] with 1 to "
                f"{most} tokens, as encode_prompt returns them"
            )

    def encode_texts(self, texts: Texts, max_sequence_length: int | None) -> Tensor:
        """Embeddings of all texts, prompts first, then with guidance the negative ones."""
        embeds = texts.prompt_embeds
        if texts.prompts is not None:
            more = {} if max_sequence_length is None else {"max_sequence_length": max_sequence_length}
            embeds = self.encode_prompt(texts.prompts, **more)
        assert embeds is not None
        if not texts.is_guided:
            return embeds
        negative = texts.negative_prompt_embeds
        if texts.negative_prompts is not None:
            negative = self._encode(texts.negative_prompts, max_sequence_length)
        assert negative is not None
        text_len = max(embeds.shape[1], negative.shape[1])
        both = (torch.nn.functional.pad(each, (0, 0, 0, text_len - each.shape[1])) for each in (embeds, negative))
        return torch.cat([each.to(embeds) for each in both])

    def _encode(self, prompts: Sequence[str], max_sequence_length: int | None) -> Tensor:
        text_len = max_sequence_length or self.transformer.config.text_len
        if self.text_encoder is None or self.tokenizer is None:
            raise InputError("this pipeline has no text encoder: pass prompt_embeds")
        self.bring(self.text_encoder)
        device = self._execution_device if self._offloading is not None else None
        return TextEncoder(
            self.text_encoder, self.tokenizer, text_len, known_cuts=self._known_cuts, device=device
        ).encode(prompts)
