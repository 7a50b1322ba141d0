"""Write config.json, generation_config.json and the tokenizer of a model folder.

Both convert and training use this module. Other programs read the folder too (mlx-lm, vLLM, and
transformers 4, which llama.cpp's converter pins) and silently ignore keys that they do not know. So
config.json holds the rotary settings under the keys of transformers 4 and of 5. The tokenizer class
is `PreTrainedTokenizerFast`: all of them know it and load it as tokenizer.json defines it.
"""

import json
import re
import shutil
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, processors
from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from alpaca import atomic
from alpaca.prompt import chat_template
from alpaca.tokens import Codec

CLASS = "PreTrainedTokenizerFast"
SENTENCEPIECE = "tokenizer.model"
TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+=* \d+\r?\n")
# Keys about the program that wrote a configuration, or about the file it was read from.
WRITERS_OWN = ("transformers_version", "_name_or_path", "_from_model_config", "dtype")


@dataclass(frozen=True)
class Vocabulary:
    """A fast tokenizer and the roles of its control tokens.

    `stops`: the tokens that may end an answer. `eos` is the first of them and ends training
    examples. `adds_bos`: whether every text starts with `bos`. `sentencepiece`: the original
    `tokenizer.model`, which llama.cpp's converter needs for the scores of its pieces.
    """

    backend: Tokenizer
    bos: str | None
    eos: str
    unk: str | None = None
    pad: str | None = None
    adds_bos: bool = True
    stops: tuple[str, ...] = ()
    sentencepiece: Path | None = None

    @property
    def pieces(self) -> int:
        """Number of tokens, control tokens included."""
        size: int = self.backend.get_vocab_size(with_added_tokens=True)
        return size

    def id(self, token: str) -> int:
        """Id of a token, which must be in the vocabulary."""
        found = self.backend.token_to_id(token)
        assert found is not None, token
        return int(found)

    def ids(self) -> dict[str, int | list[int]]:
        """The entries of config.json and generation_config.json that name control tokens."""
        stops = [self.id(token) for token in self.stops or (self.eos,)]
        ids: dict[str, int | list[int]] = {"eos_token_id": stops[0] if len(stops) == 1 else stops}
        for role, token in (("bos", self.bos), ("pad", self.pad)):
            if token is not None:
                ids[f"{role}_token_id"] = self.id(token)
        return ids

    def write(self, folder: Path, context: int) -> None:
        """Write the tokenizer's three JSON files, and `tokenizer.model` if there is one."""
        roles = {"bos_token": self.bos, "eos_token": self.eos, "unk_token": self.unk}
        roles["pad_token"] = self.pad
        special = {role: token for role, token in roles.items() if token is not None}
        settings = {
            "tokenizer_class": CLASS,
            **special,
            "model_max_length": context,
            "clean_up_tokenization_spaces": False,
            "chat_template": chat_template(self.adds_bos),
        }
        self.backend.no_truncation()
        self.backend.no_padding()
        self.backend.post_processor = self._post_processor()
        atomic.write_text(folder / "tokenizer.json", self.backend.to_str(pretty=True))
        if self.sentencepiece is not None:
            # tokenizer.model lacks the added tokens; programs that read it look for them here.
            added = self.backend.get_added_tokens_decoder().items()
            settings["added_tokens_decoder"] = {str(at): _flags(token) for at, token in added}
            shutil.copyfile(self.sentencepiece, folder / SENTENCEPIECE)
        _write_json(folder / "tokenizer_config.json", settings)
        _write_json(folder / "special_tokens_map.json", special)

    def _post_processor(self) -> processors.PostProcessor | None:
        if not self.adds_bos or self.bos is None:
            return None
        return processors.TemplateProcessing(
            single=f"{self.bos} $A",
            pair=f"{self.bos} $A {self.bos}:1 $B:1",
            special_tokens=[(self.bos, self.id(self.bos))],
        )


def vocabulary_of(codec: Codec) -> Vocabulary:
    """The vocabulary of a loaded tokenizer, with the `tokenizer.model` in its folder."""
    tokenizer = codec.tokenizer
    return Vocabulary(
        Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()),  # a copy: `write` changes it
        bos=tokenizer.bos_token,
        eos=tokenizer.eos_token,
        unk=tokenizer.unk_token,
        pad=tokenizer.pad_token,
        adds_bos=codec.bos is not None,
        sentencepiece=sentencepiece_file(Path(tokenizer.name_or_path)),
    )


def sentencepiece_file(folder: Path) -> Path | None:
    """A folder's `tokenizer.model`, if it is a SentencePiece file.

    Llama 3's tiktoken file has the same name; llama.cpp's converter would read it as SentencePiece
    and fail.
    """
    path = folder / SENTENCEPIECE
    return path if path.is_file() and not is_tiktoken(path) else None


def is_tiktoken(path: Path) -> bool:
    """Whether a tokenizer file has Llama 3's format: lines of base64 and rank."""
    with open(path, "rb") as file:
        return TIKTOKEN_LINE.match(file.read(1024)) is not None


def write(
    folder: Path,
    config: PreTrainedConfig,
    vocabulary: Vocabulary,
    dtype: torch.dtype,
    generation: dict[str, Any] | None = None,
) -> None:
    """Write config.json, generation_config.json and the tokenizer's files.

    `dtype`: the type of the weights. `generation`: generation settings other than token ids.
    """
    settings = config_json(config, vocabulary, dtype)
    _write_json(folder / "config.json", settings, sort_keys=True)
    known = {key: value for key, value in (generation or {}).items() if key not in WRITERS_OWN}
    for key in ("bos_token_id", "pad_token_id"):
        if settings.get(key) is not None:
            known[key] = settings[key]
    _write_json(folder / "generation_config.json", known | vocabulary.ids(), sort_keys=True)
    vocabulary.write(folder, config.max_position_embeddings)


def config_json(
    config: PreTrainedConfig, vocabulary: Vocabulary, dtype: torch.dtype
) -> dict[str, Any]:
    """config.json with the keys of transformers 4 and of transformers 5."""
    # A deep copy: transformers returns, and modifies, the dictionaries it was given.
    settings = deepcopy(config.to_diff_dict())
    kind = str(dtype).removeprefix("torch.")
    return {
        **{key: value for key, value in settings.items() if key not in WRITERS_OWN},
        **_rope_of_version_4(settings.get("rope_parameters") or {}),
        **vocabulary.ids(),
        "architectures": [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]],
        "dtype": kind,
        "torch_dtype": kind,
    }


def _rope_of_version_4(parameters: dict[str, Any]) -> dict[str, Any]:
    """`rope_theta`, `rope_scaling` and `partial_rotary_factor`, from version 5's one dictionary.

    If each type of layer has its own settings, version 4 uses these keys for the layers with full
    attention, and `rope_local_base_freq` for the frequency of the others (Gemma 3).
    """
    if "full_attention" in parameters:
        version4 = _rope_of_version_4(parameters["full_attention"])
        local = parameters.get("sliding_attention", {}).get("rope_theta")
        return version4 if local is None else {**version4, "rope_local_base_freq": local}
    top_level = ("rope_theta", "partial_rotary_factor")
    version4 = {key: parameters[key] for key in top_level if key in parameters}
    scaling = {key: value for key, value in parameters.items() if key not in top_level}
    if scaling.get("rope_type", "default") != "default":
        version4["rope_scaling"] = scaling
    return version4


def _flags(token: AddedToken) -> dict[str, Any]:
    names = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    return {name: getattr(token, name) for name in names}


def _write_json(path: Path, value: object, *, sort_keys: bool = False) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=False, sort_keys=sort_keys)
    atomic.write_text(path, text + "\n")
