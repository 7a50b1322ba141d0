"""Read the tokenizer of a Hugging Face folder, old or new.

SentencePiece's `tokenizer.model` is read first if there is one. It is the original; files derived
from it in early 2023 have empty or swapped special tokens. The JSON files add later settings: added
tokens (Alpaca's `[PAD]`, ChatML's `<|im_end|>`), which tokens are BOS and EOS, and whether a text
starts with BOS or with a space.
"""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from alpaca.convert.hfsettings import Settings
from alpaca.convert.vocabularies import read_vocabulary
from alpaca.description import SENTENCEPIECE, Vocabulary, is_tiktoken, sentencepiece_file
from alpaca.errors import UserError

ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")
FILES = (
    SENTENCEPIECE,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
# Key of tokenizer_config.json -> how it is handled. A note names any other key.
KEYS = {
    **dict.fromkeys(ROLES, "used"),
    "add_bos_token": "used",
    "add_prefix_space": "used with tokenizer.model; tokenizer.json contains it",
    "added_tokens_decoder": "used",
    "add_eos_token": "not needed: EOS ends every training example, and no prompt",
    "additional_special_tokens": "not needed: tokenizer.json says which tokens are special",
    "extra_special_tokens": "not needed: tokenizer.json says which tokens are special",
    "model_specific_special_tokens": "not needed: tokenizer.json says which tokens are special",
    "auto_map": "dropped: code in a folder is never run",
    "backend": "dropped: about the program that wrote the file",
    "chat_template": "replaced by the Alpaca template",
    "clean_up_tokenization_spaces": "replaced: decoding must return the same text",
    "errors": "not needed: tokenizer.json itself handles invalid UTF-8",
    "is_local": "dropped: about the program that wrote the file",
    "legacy": "not needed: tokenizer.model or tokenizer.json contains it",
    "local_files_only": "dropped: about the program that wrote the file",
    "max_length": "dropped: the writer's own truncation settings",
    "model_input_names": "dropped: decoders take token ids only",
    "model_max_length": "replaced by the model's context",
    "name_or_path": "dropped: the path that its writer loaded it from",
    "pad_to_multiple_of": "dropped: nothing is padded",
    "pad_token_type_id": "dropped: nothing is padded",
    "padding_side": "dropped: nothing is padded",
    "padding": "dropped: nothing is padded",
    "processor_class": "dropped: only text is processed",
    "return_token_type_ids": "dropped: decoders take token ids only",
    "sp_model_kwargs": "not needed: empty in every published model",
    "spaces_between_special_tokens": "not needed: tokenizer.json defines the decoding",
    "special_tokens_map_file": "dropped: a path on the writer's machine",
    "split_special_tokens": "not needed: text is never encoded as control tokens",
    "stride": "dropped: the writer's own truncation settings",
    "tokenizer_class": "replaced by PreTrainedTokenizerFast",
    "tokenizer_file": "dropped: a path on the writer's machine",
    "trust_remote_code": "dropped: code in a folder is never run",
    "truncation_side": "dropped: the writer's own truncation settings",
    "truncation_strategy": "dropped: the writer's own truncation settings",
    "use_default_system_prompt": "replaced by the Alpaca template",
    "use_fast": "dropped: the fast tokenizer is always written",
    "vocab_file": "dropped: a path on the writer's machine",
}
# Keys that, when set, change how a text is encoded in a way that this program does not support.
REFUSED = ("do_lower_case", "remove_space", "keep_accents")


def read_tokenizer(
    folder: Path, settings: Settings
) -> tuple[Vocabulary, list[Path], tuple[str, ...]]:
    """The tokenizer of a folder, the files it was read from, and notes for the user.

    Raises:
        UserError: there is no tokenizer, it is damaged, or it has more tokens than the model.
    """
    files = [folder / name for name in FILES if (folder / name).is_file()]
    parsed = {path.name: _read_object(path) for path in files if path.suffix == ".json"}
    tokenizer_config = parsed.get("tokenizer_config.json", {})
    for key in REFUSED:
        if tokenizer_config.get(key):
            raise UserError(
                f"{folder / 'tokenizer_config.json'} sets {key}, which is not supported.",
                "Check that it is the tokenizer of a LLaMA, SmolLM, Mistral or Qwen model.",
            )
    base = _base(folder, tokenizer_config)
    for index, token in sorted(_added(parsed).items()):
        if base.backend.token_to_id(token.content) is None:
            add = base.backend.add_special_tokens if token.special else base.backend.add_tokens
            add([token])
        if base.backend.token_to_id(token.content) != index:
            raise UserError(f"{folder}: the added token {token.content!r} cannot have id {index}.")
    vocabulary, notes = _with_roles(
        folder, base, _roles(parsed), settings, tokenizer_config.get("add_bos_token")
    )
    rows = settings.config["vocab_size"]
    if vocabulary.pieces > rows:
        raise UserError(
            f"The tokenizer of {folder} has {vocabulary.pieces:,} tokens, but the model "
            f"{rows:,} rows.",
            "Put this model's own tokenizer there.",
        )
    unknown = ", ".join(key for key in tokenizer_config if key not in KEYS and key not in REFUSED)
    if unknown:
        notes += (f"note: unknown keys of tokenizer_config.json, not copied: {unknown}",)
    return vocabulary, files, notes


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise UserError(f"{path} is not JSON: {error}", "Fetch the file again.") from None
    return value if isinstance(value, dict) else {}


def _base(folder: Path, tokenizer_config: dict[str, Any]) -> Vocabulary:
    """The vocabulary without the JSON files' additions; `eos` is empty if it is not known yet."""
    original, written = folder / SENTENCEPIECE, folder / "tokenizer.json"
    if original.is_file():
        try:
            if is_tiktoken(original):
                chat = "eot_id" in str(tokenizer_config.get("eos_token", ""))
                return read_vocabulary(original, folder.name, chat)[0]
            return read_vocabulary(
                original, folder.name, None, leading_space=tokenizer_config.get("add_prefix_space")
            )[0]
        except UserError:
            if not written.is_file():
                raise
    if not written.is_file():
        raise UserError(
            f"There is no tokenizer in {folder}.",
            "Put its tokenizer.model or tokenizer.json there.",
        )
    try:
        backend = Tokenizer.from_file(str(written))
    except Exception as error:  # the tokenizers library raises bare Exception
        raise UserError(f"{written} is damaged: {error}", "Fetch the file again.") from None
    return Vocabulary(backend, bos=None, eos="", sentencepiece=sentencepiece_file(folder))


def _added(parsed: dict[str, dict[str, Any]]) -> dict[int, AddedToken]:
    """Id -> token, for the tokens that were added to the original vocabulary."""
    added = {
        int(index): AddedToken(token, normalized=False, special=True)
        for token, index in parsed.get("added_tokens.json", {}).items()
    }
    listed = parsed.get("tokenizer_config.json", {}).get("added_tokens_decoder", {})
    for index, entry in listed.items():
        flags = ("lstrip", "rstrip", "single_word", "normalized", "special")
        added[int(index)] = AddedToken(
            entry["content"], **{flag: bool(entry.get(flag, flag == "special")) for flag in flags}
        )
    return added


def _roles(parsed: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Role -> token, from both files that define roles; skips the empty strings of early 2023."""
    found = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        for role in ROLES:
            value = parsed.get(name, {}).get(role)
            text = value.get("content") if isinstance(value, dict) else value
            if isinstance(text, str) and text:
                found[role] = text
    return found


def _with_roles(
    folder: Path, base: Vocabulary, roles: dict[str, str], settings: Settings, adds: Any
) -> tuple[Vocabulary, tuple[str, ...]]:
    """The vocabulary with its control tokens, and a note about ids that were ignored.

    `adds`: the value of add_bos_token, if any. An EOS that is the vocabulary's own BOS or unknown
    token is one of the wrong ids of early 2023 and is ignored: with it, answers would never stop.
    """
    backend = base.backend
    never_ends = {token for token in (base.bos, base.unk) if token is not None}
    named = {
        role: token
        for role, token in roles.items()
        if backend.token_to_id(token) is not None
        and not (role == "eos_token" and token in never_ends)
        and not (role == "bos_token" and base.bos is not None and token in (base.eos, base.unk))
    }
    listed = [backend.id_to_token(index) for index in settings.ends]
    refused = sorted(never_ends & set(listed))
    ends = [token for token in listed if token is not None and token not in never_ends]
    eos = named.get("eos_token") or base.eos or (ends[0] if ends else "")
    if not eos:
        raise UserError(f"{folder} does not define the token that ends a text (eos_token).")
    bos = named.get("bos_token", base.bos)
    if isinstance(adds, bool):
        adds_bos = adds and bos is not None
    elif base.bos is not None:
        adds_bos = base.adds_bos
    else:
        adds_bos = bos is not None and backend.encode("a").ids[:1] == [backend.token_to_id(bos)]
    made = Vocabulary(
        backend,
        bos=bos,
        eos=eos,
        unk=named.get("unk_token", base.unk),
        pad=named.get("pad_token"),
        adds_bos=adds_bos,
        stops=tuple(dict.fromkeys([eos, *base.stops, *ends])),
        sentencepiece=base.sentencepiece,
    )
    wrong = f"note: does not end an answer, although config.json lists it: {', '.join(refused)}"
    return made, (wrong,) if refused else ()
