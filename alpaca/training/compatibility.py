"""Model, tokenizer and flags that can't go together are refused before ranks meet.

Each mistake here would train, and give a model that is wrong or can't be served.
"""

from transformers import AutoConfig, PreTrainedTokenizerBase

from alpaca.errors import UserError
from alpaca.folder import load_tokenizer
from alpaca.model import check_weights
from alpaca.recipe.arguments import DataFlags


def check(flags: DataFlags, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise UserError unless the model takes this tokenizer's ids and sees whole examples."""
    folder = flags.model_name_or_path
    check_weights(folder)
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    vocabulary = tokenizer.get_vocab()
    if max(vocabulary.values()) >= config.vocab_size:
        raise UserError(
            f"The tokenizer has ids up to {max(vocabulary.values())}, but the model of {folder} "
            f"has only {config.vocab_size}.",
            "They belong to different models; without --tokenizer_name_or_path, "
            "the model's own is used.",
        )
    given = flags.tokenizer_name_or_path
    own = folder / "tokenizer.json"
    other = given and own.is_file() and not own.samefile(given / own.name)
    if other and load_tokenizer(folder).get_vocab() != vocabulary:
        raise UserError(
            f"The tokenizer of {given} is not the one in {folder}: their vocabularies differ.",
            "Leave --tokenizer_name_or_path out: the model's own is used.",
        )
    window = getattr(config, "sliding_window", None)
    if window and flags.model_max_length > window:
        raise UserError(
            f"--model_max_length {flags.model_max_length} is longer than the attention window "
            f"of the model of {folder}, {window} tokens (sliding_window in its config.json).",
            f"Use --model_max_length {window} or less.",
        )
