"""A tokenizer on its way to disk: fast, with its special tokens, and the Alpaca chat template.

The class written is `PreTrainedTokenizerFast`, the one name that transformers 4, transformers 5 and
vLLM all know and all load as tokenizer.json says. `LlamaTokenizerFast` would be rebuilt by
transformers 5 with another rule for leading spaces, `TokenizersBackend` is unknown to version 4.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer, processors

from alpaca import atomic
from alpaca.prompt import chat_template

CLASS = "PreTrainedTokenizerFast"


@dataclass(frozen=True)
class Vocabulary:
    """A fast tokenizer and the roles of its control tokens.

    `stops` are the tokens that may end an answer; `eos` is the first of them and ends training
    examples. `adds_bos`: whether every text starts with `bos`.
    """

    backend: Tokenizer
    bos: str | None
    eos: str
    unk: str | None = None
    pad: str | None = None
    adds_bos: bool = True
    stops: tuple[str, ...] = ()

    @property
    def pieces(self) -> int:
        """Number of tokens, control tokens included."""
        size: int = self.backend.get_vocab_size(with_added_tokens=True)
        return size

    def id(self, token: str) -> int:
        """Id of a token that is in the vocabulary."""
        found = self.backend.token_to_id(token)
        assert found is not None, token
        return int(found)

    def ids(self) -> dict[str, int | list[int] | None]:
        """The entries of config.json and generation_config.json that name control tokens."""
        stops = [self.id(token) for token in self.stops or (self.eos,)]
        return {
            "bos_token_id": None if self.bos is None else self.id(self.bos),
            "eos_token_id": stops[0] if len(stops) == 1 else stops,
            "pad_token_id": None if self.pad is None else self.id(self.pad),
        }

    def write(self, folder: Path, context: int) -> None:
        """Write tokenizer.json, tokenizer_config.json and special_tokens_map.json."""
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
        self.backend.post_processor = self._post_processor()
        atomic.write_text(folder / "tokenizer.json", self.backend.to_str(pretty=True))
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


def _write_json(path: Path, value: object) -> None:
    atomic.write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
