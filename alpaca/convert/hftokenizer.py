"""The tokenizer of a Hugging Face folder, whatever year it is from.

`tokenizer.model`, where there is one, is the original and is read first: files derived from it in
early 2023 carry empty or swapped special tokens. Tokens added later, like Alpaca's `[PAD]`, come
from `added_tokens.json` or `tokenizer_config.json`.
"""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from alpaca.convert.vocabularies import read_vocabulary
from alpaca.description import Vocabulary
from alpaca.errors import UserError

ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")
FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)


def read_tokenizer(
    folder: Path, config: dict[str, Any], rows: int
) -> tuple[Vocabulary, list[Path]]:
    """The tokenizer of a folder whose embedding has `rows` rows, and the files it came from.

    Raises:
        UserError: there is none, it is damaged, or it has more tokens than the model.
    """
    files = [folder / name for name in FILES if (folder / name).is_file()]
    held = {path.name: _read_object(path) for path in files if path.suffix == ".json"}
    roles = _roles(held)
    if (folder / "tokenizer.model").is_file():
        vocabulary = _from_model(folder, held, roles)
    elif (folder / "tokenizer.json").is_file():
        vocabulary = _from_json(folder, roles, config)
    else:
        raise UserError(
            f"There is no tokenizer in {folder}.",
            "Put its tokenizer.model or tokenizer.json there.",
        )
    if vocabulary.pieces > rows:
        raise UserError(
            f"The tokenizer of {folder} has {vocabulary.pieces:,} tokens, the model {rows:,} rows.",
            "Put this model's own tokenizer there.",
        )
    return vocabulary, files


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not JSON: {error}", "Fetch the file again.") from None
    return value if isinstance(value, dict) else {}


def _roles(held: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Role -> token, from both files that may say so; empty strings of early 2023 say nothing."""
    found = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        for role in ROLES:
            value = held.get(name, {}).get(role)
            text = value.get("content") if isinstance(value, dict) else value
            if isinstance(text, str) and text:
                found[role] = text
    return found


def _from_model(folder: Path, held: dict[str, dict[str, Any]], roles: dict[str, str]) -> Vocabulary:
    chat = "eot_id" in roles.get("eos_token", "")
    base, _ = read_vocabulary(folder / "tokenizer.model", folder.name, chat)
    for index, token in sorted(_added(held).items()):
        if base.backend.token_to_id(token) is None:
            base.backend.add_special_tokens([AddedToken(token, normalized=False, special=True)])
        if base.backend.token_to_id(token) != index:
            raise UserError(f"{folder}: the added token {token!r} cannot have id {index}.")
    pad = roles.get("pad_token")
    known = pad is not None and base.backend.token_to_id(pad) is not None
    return Vocabulary(
        base.backend,
        bos=base.bos,
        eos=base.eos,
        unk=base.unk,
        pad=pad if known else None,
        stops=base.stops,
        sentencepiece=base.sentencepiece,
    )


def _added(held: dict[str, dict[str, Any]]) -> dict[int, str]:
    """Id -> token of what was added after the vocabulary was made."""
    added = {int(index): token for token, index in held.get("added_tokens.json", {}).items()}
    listed = held.get("tokenizer_config.json", {}).get("added_tokens_decoder", {})
    return added | {int(index): entry["content"] for index, entry in listed.items()}


def _from_json(folder: Path, roles: dict[str, str], config: dict[str, Any]) -> Vocabulary:
    path = folder / "tokenizer.json"
    try:
        backend = Tokenizer.from_file(str(path))
    except Exception as error:  # the tokenizers library raises bare Exception
        raise UserError(f"{path} is damaged: {error}", "Fetch the file again.") from None
    present = {
        role: token for role, token in roles.items() if backend.token_to_id(token) is not None
    }
    stops = config.get("eos_token_id")
    listed = stops if isinstance(stops, list) else [stops] if isinstance(stops, int) else []
    tokens = [token for index in listed if (token := backend.id_to_token(index)) is not None]
    eos = present.get("eos_token") or (tokens[0] if tokens else None)
    if eos is None:
        raise UserError(f"{folder} does not say which token ends a text (eos_token).")
    bos = present.get("bos_token")
    starts = backend.encode("a").ids[:1]
    return Vocabulary(
        backend,
        bos=bos,
        eos=eos,
        unk=present.get("unk_token"),
        pad=present.get("pad_token"),
        adds_bos=bos is not None and starts == [backend.token_to_id(bos)],
        stops=(eos, *(token for token in tokens if token != eos)),
    )
