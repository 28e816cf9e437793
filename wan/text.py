"""The UMT5 text encoder and its tokenizer, through transformers, from Wan's own files or a diffusers folder."""

import html
import logging
import re
import unicodedata
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

import ftfy
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    AutoTokenizer,
    BatchEncoding,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
)

from wan.checkpoints.configs import check_settings, read_config
from wan.checkpoints.identify import family
from wan.checkpoints.loading import StateDict, as_state_dict, load_strict, read_folder, read_weights
from wan.checkpoints.saving import write_pickle
from wan.checkpoints.tensors import require_one_type_per_role
from wan.utils.device import holds_float16, wide_range_dtype
from wan.utils.errors import CheckpointError, InputError
from wan.utils.files import LFS_POINTER, is_lfs_pointer
from wan.utils.ranges import Bounds, shown

log = logging.getLogger(__name__)

NATIVE_TEXT_FILE = "models_t5_umt5-xxl-enc-bf16.pth"
NATIVE_TOKENIZER_FOLDER = "google/umt5-xxl"
SPECIAL_TOKENS = ("<pad>", "</s>", "<unk>")
_TRANSFORMERS_FILES = ("model.safetensors", "model.safetensors.index.json")
UMT5_XXL: dict[str, Any] = {
    "vocab_size": 256384,
    "dim": 4096,
    "dim_attn": 4096,
    "dim_ffn": 10240,
    "num_heads": 64,
    "num_layers": 24,
    "num_buckets": 32,
    "shared_pos": False,
    "max_distance": 128,
    "norm_eps": 1e-6,
}
"""Sizes of the released encoder, under the names of Wan's own code."""
TOY_TEXT: dict[str, Any] = UMT5_XXL | {
    "vocab_size": 256,
    "dim": 64,
    "dim_attn": 64,
    "dim_ffn": 128,
    "num_heads": 4,
    "num_layers": 2,
}
"""Sizes of the toy world's encoder."""

# A block's parts: Wan's names and those of transformers.
_BLOCK_PARTS = {
    "norm1": "layer.0.layer_norm",
    "attn": "layer.0.SelfAttention",
    "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
    "norm2": "layer.1.layer_norm",
    "ffn.gate.0": "layer.1.DenseReluDense.wi_0",
    "ffn.fc1": "layer.1.DenseReluDense.wi_1",
    "ffn.fc2": "layer.1.DenseReluDense.wo",
}
INVISIBLE_LETTERS = "\u115f\u1160\u2800\u3164\uffa0"
"""Characters that Unicode counts as letters or symbols and that show nothing: fillers and the empty Braille cell."""
SHOWN_CHARACTERS = 60
"""How much of a prompt, and of what is cut from it, a warning shows."""
TRIAL_TEXT = "a \u2603"
"""What a tokenizer is tried on: a word, and a character that few know."""
# What shapes an encoder in transformers' config.json, and the names of its sizes here and there.
_TRANSFORMERS: dict[str, Any] = {
    "vocab_size": Annotated[int, Bounds(1, 1 << 24)],
    **dict.fromkeys(("d_model", "d_kv", "d_ff"), Annotated[int, Bounds(1, 1 << 17)]),
    **dict.fromkeys(("num_layers", "num_heads"), Annotated[int, Bounds(1, 1024)]),
    "relative_attention_num_buckets": Annotated[int, Bounds(2, 1 << 16)],
    "relative_attention_max_distance": Annotated[int, Bounds(2, 1 << 20)],
    "layer_norm_epsilon": Annotated[float, Bounds(0, 0.1, above=True)],
    "feed_forward_proj": Literal["gated-gelu"],
    "dense_act_fn": Literal["gelu_new"],
    "is_gated_act": Literal[True],
    "is_decoder": Literal[False],
    "tie_word_embeddings": bool,
}
_SIZES = {
    "vocab_size": "vocab_size",
    "dim": "d_model",
    "dim_ffn": "d_ff",
    "num_heads": "num_heads",
    "num_layers": "num_layers",
    "num_buckets": "relative_attention_num_buckets",
    "max_distance": "relative_attention_max_distance",
    "norm_eps": "layer_norm_epsilon",
}
_NEEDED = (*_SIZES.values(), "d_kv", "feed_forward_proj")
_EMBEDDING = "token_embedding.weight"
_EMBEDDING_COPIES = ("shared.weight", "encoder.embed_tokens.weight")


def clean_prompt(prompt: str) -> str:
    """Mend broken Unicode, resolve HTML entities and collapse white space, as Wan does before tokenizing."""
    mended = html.unescape(html.unescape(ftfy.fix_text(prompt)))
    return re.sub(r"\s+", " ", mended).strip()


def has_text(prompt: str) -> bool:
    """Whether anything that can be seen is left of a prompt once it is cleaned.

    Spaces, control characters, marks without a letter, and characters without a shape of their own do not count.
    """
    return any(
        unicodedata.category(character)[0] not in "CZM" and character not in INVISIBLE_LETTERS
        for character in clean_prompt(prompt)
    )


def _shortened(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}…"


class TextEncoder:
    """Prompts to embeddings.

    Args:
        model: the encoder. One in float16 is cast, as `wide_range_dtype` says: its activations exceed that range, and
            transformers would clip them.
        tokenizer: None if only token ids will be encoded.
        text_len: tokens of every embedding, the end mark included; longer prompts are cut with a warning, shorter ones
            padded with zero rows.
        known_cuts: prompts whose cut was reported, which grows; encoders that share it warn once per prompt.
        device: where it computes, if its weights are elsewhere between uses; None for where they are.
    """

    def __init__(
        self,
        model: UMT5EncoderModel,
        tokenizer: PreTrainedTokenizerBase | None,
        text_len: int,
        known_cuts: set[str] | None = None,
        device: torch.device | None = None,
    ) -> None:
        if holds_float16(model):
            model.to(dtype=wide_range_dtype(torch.float16, model.device))
        self.model = model
        self.tokenizer = tokenizer
        self.text_len = text_len
        self._known_cuts = set[str]() if known_cuts is None else known_cuts
        self._device = device

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings of some prompts, [B, text_len, dim] in the encoder's dtype.

        Raises:
            InputError: there is no tokenizer.
        """
        tokens = self.tokens(prompts)
        return self.encode_ids(tokens["input_ids"], tokens["attention_mask"])

    def tokens(self, prompts: Sequence[str]) -> BatchEncoding:
        """`input_ids` and `attention_mask` of some prompts, [B, text_len] each.

        Raises:
            InputError: there is no tokenizer.
        """
        if self.tokenizer is None:
            raise InputError("this text encoder has no tokenizer: load it from a folder that has one")
        cleaned = [clean_prompt(prompt) for prompt in prompts]
        tokens = self.tokenizer(
            cleaned,
            padding="max_length",
            truncation=True,
            max_length=self.text_len,
            return_attention_mask=True,
            return_tensors="pt",
        )
        for prompt, mask_T in zip(cleaned, tokens["attention_mask"], strict=True):
            if mask_T.all() and prompt not in self._known_cuts:
                self._warn_of_cut(self.tokenizer, prompt)
        return tokens

    def _warn_of_cut(self, tokenizer: PreTrainedTokenizerBase, prompt: str) -> None:
        """Report the part of a cleaned prompt that does not fit."""
        whole = tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=tokenizer.is_fast, verbose=False)
        ids, kept = whole["input_ids"], self.text_len - tokenizer.num_special_tokens_to_add()
        if len(ids) <= kept:
            return
        self._known_cuts.add(prompt)
        number, from_the_left = len(ids) - kept, tokenizer.truncation_side == "left"
        if tokenizer.is_fast:
            places = whole["offset_mapping"]
            lost = prompt[: places[number - 1][1]] if from_the_left else prompt[places[kept][0] :]
        else:
            lost = tokenizer.decode(ids[:number] if from_the_left else ids[kept:])
        log.warning(
            "the prompt '%s' is too long: of its %d tokens the text encoder takes %d, the %s %d are dropped: '%s'",
            _shortened(prompt),
            len(ids),
            kept,
            "first" if from_the_left else "last",
            number,
            _shortened(lost.strip()),
        )

    @torch.no_grad()
    def encode_ids(self, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """Embeddings of token ids; rows where the mask is 0 are zero."""
        ids, mask = (x.to(self._device or self.model.device) for x in (ids_BT, mask_BT))
        hidden = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
        return hidden * mask[..., None].to(hidden.dtype)


def word_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """A tokenizer that knows some words, with UMT5's special tokens: padding 0, end 1, unknown 2."""
    vocabulary = {word: index for index, word in enumerate([*SPECIAL_TOKENS, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL_TOKENS[2]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Punctuation()])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    pad, end, unknown = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=pad, eos_token=end, unk_token=unknown)


def umt5_config(config: Mapping[str, Any]) -> UMT5Config:
    """transformers' configuration of an encoder of these sizes, whose keys are those of `UMT5_XXL`.

    Raises:
        CheckpointError: one position table for all blocks, which UMT5 does not have.
    """
    if config["shared_pos"]:
        raise CheckpointError("a text encoder with one position table for all blocks is a T5, not a UMT5")
    return UMT5Config(
        vocab_size=config["vocab_size"],
        d_model=config["dim"],
        d_kv=config["dim_attn"] // config["num_heads"],
        d_ff=config["dim_ffn"],
        num_layers=config["num_layers"],
        num_heads=config["num_heads"],
        relative_attention_num_buckets=config["num_buckets"],
        relative_attention_max_distance=config["max_distance"],
        layer_norm_epsilon=config["norm_eps"],
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )


def native_text_name(name: str) -> str:
    """Wan's name of a parameter of transformers' UMT5EncoderModel."""
    if name in _EMBEDDING_COPIES:
        return _EMBEDDING
    if name == "encoder.final_layer_norm.weight":
        return "norm.weight"
    block, rest = re.sub(r"^encoder\.block\.", "", name).split(".", 1)
    for ours, theirs in sorted(_BLOCK_PARTS.items(), key=lambda item: -len(item[1])):
        if rest.startswith(theirs + "."):
            return f"blocks.{block}.{ours}{rest.removeprefix(theirs)}"
    raise KeyError(name)


def native_umt5_names(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Wan's names and shapes of all parameters of an encoder; nothing is allocated."""
    with torch.device("meta"):
        model = UMT5EncoderModel(umt5_config(config))
    return {native_text_name(name): tuple(value.shape) for name, value in model.state_dict().items()}


def umt5_from_native(
    state: StateDict, config: Mapping[str, Any], source: str | Path = "text encoder weights"
) -> UMT5EncoderModel:
    """An encoder from weights under Wan's names, which it takes over without a copy.

    Raises:
        CheckpointError: names or shapes do not fit.
    """
    if _EMBEDDING not in state:
        raise CheckpointError(f"{source} holds {family(state)}, not a UMT5 encoder: check the model folder")
    with torch.device("meta"):
        model = UMT5EncoderModel(umt5_config(config))
    names = {name: native_text_name(name) for name in model.state_dict()}
    unknown = {name: value for name, value in state.items() if name not in names.values()}
    known = {name: state[native] for name, native in names.items() if native in state}
    return _filled(model, known | unknown, source)


def _filled(model: UMT5EncoderModel, state: StateDict, source: str | Path) -> UMT5EncoderModel:
    require_one_type_per_role(state, source)
    load_strict(model, state, source)
    model.tie_weights()
    return model.eval()


def load_text_encoder(
    folder: str | Path,
    *,
    config: Mapping[str, Any] = UMT5_XXL,
    text_len: int = 512,
    dtype: torch.dtype = torch.float32,
    device: torch.device = torch.device("cpu"),
) -> TextEncoder:
    """Load encoder and tokenizer, strictly and offline.

    Args:
        folder: a native Wan folder, or a diffusers folder with `text_encoder` and `tokenizer`.
        config: sizes of native weights; diffusers folders bring their own.
        text_len: see `TextEncoder`.
        dtype, device: of the encoder; in the place of float16 comes what `wide_range_dtype` says.

    Raises:
        CheckpointError: something is missing, damaged, of another family, or does not fit.
    """
    folder = Path(folder)
    native = folder / NATIVE_TEXT_FILE
    if native.is_file():
        tokenizer = _load_tokenizer(folder / NATIVE_TOKENIZER_FOLDER, config["vocab_size"])
        model = umt5_from_native(as_state_dict(read_weights(native), native), config, native)
    elif (folder / "text_encoder" / "config.json").is_file():
        sizes = _transformers_sizes(folder / "text_encoder")
        tokenizer = _load_tokenizer(folder / "tokenizer", sizes["vocab_size"])
        model = _load_transformers(folder / "text_encoder", sizes)
    else:
        raise CheckpointError(f"no text encoder in {folder}: expected {NATIVE_TEXT_FILE}, or text_encoder/")
    return TextEncoder(model.to(device=device, dtype=wide_range_dtype(dtype, device)), tokenizer, text_len)


def _load_tokenizer(folder: Path, vocab_size: int) -> PreTrainedTokenizerBase:
    """A folder's tokenizer, tried on a text.

    Args:
        vocab_size: rows of the encoder's embedding, which every id must be one of.

    Raises:
        CheckpointError: it is missing, damaged, or of another encoder.
    """
    if not folder.is_dir():
        raise CheckpointError(f"no tokenizer in {folder}: download it with scripts/download_weights.py")
    try:
        # With trust_remote_code unset, transformers asks on the terminal whether to run a folder's own code.
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        trial = tokenizer(TRIAL_TEXT)["input_ids"]
        ids = [*tokenizer.get_vocab().values(), *trial]
    except MemoryError:
        raise
    except Exception as error:  # both libraries raise of any class, tokenizers mere `Exception`
        with suppress(OSError):
            for file in filter(is_lfs_pointer, filter(Path.is_file, sorted(folder.iterdir()))):
                raise CheckpointError(f"{file} is {LFS_POINTER.format('tokenizer')}") from error
        raise CheckpointError(
            f"cannot read the tokenizer in {folder} ({type(error).__name__}): it is damaged, incomplete or not a UMT5 "
            "tokenizer; download it again"
        ) from error
    if tokenizer.pad_token is None:
        raise CheckpointError(f"the tokenizer in {folder} has no padding token: it is not a UMT5 tokenizer")
    if not trial or not 0 <= min(ids) <= max(ids) < vocab_size:
        what = f"ids up to {max(ids)}" if trial else "no ids for a text"
        raise CheckpointError(
            f"the tokenizer in {folder} gives {what}, the text encoder knows 0 to {vocab_size - 1}: they are of two "
            "models, or it is damaged; download it again"
        )
    return tokenizer


def _transformers_sizes(folder: Path) -> dict[str, Any]:
    """The sizes in transformers' config.json, under the names of `UMT5_XXL`.

    Raises:
        CheckpointError: it is missing, malformed, or of another family.
    """
    path = folder / "config.json"
    config = read_config(path)
    if config.get("model_type") != "umt5":
        raise CheckpointError(
            f"{folder} holds a {shown(config.get('model_type'))}, not a UMT5 encoder: check the folder"
        )
    # Of the many settings that transformers writes, these shape the encoder.
    found = check_settings(config, _TRANSFORMERS, path, needed=_NEEDED, others=True)
    sizes = {ours: found[theirs] for ours, theirs in _SIZES.items()}
    return sizes | {"dim_attn": found["d_kv"] * found["num_heads"], "shared_pos": False}


def _load_transformers(folder: Path, sizes: Mapping[str, Any]) -> UMT5EncoderModel:
    state, file = read_folder(folder, _TRANSFORMERS_FILES)
    # The embedding is one tensor under two names; a file need hold only one of them.
    copies = [state[name] for name in _EMBEDDING_COPIES if name in state]
    if copies:
        if any(copy.shape != copies[0].shape or not torch.equal(copy, copies[0]) for copy in copies):
            raise CheckpointError(f"{file}: {' and '.join(_EMBEDDING_COPIES)} differ: it is damaged; download it again")
        state |= dict.fromkeys(_EMBEDDING_COPIES, copies[0])
    with torch.device("meta"):
        model = UMT5EncoderModel(umt5_config(sizes))
    return _filled(model, state, file)


def save_native_umt5(model: UMT5EncoderModel, path: Path) -> None:
    """Write the weights under Wan's names as a `.pth`; atomic.

    Raises:
        InputError: the file cannot be written.
    """
    write_pickle(path, {native_text_name(name): value for name, value in model.state_dict().items()})
