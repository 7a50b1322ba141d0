"""Model, tokenizer and flags that can't go together are refused before ranks meet.

Each mistake here would train, and give a model that is wrong or can't be served.
"""

from transformers import AutoConfig, PreTrainedTokenizerBase

from alpaca.errors import UserError
from alpaca.folder import load_tokenizer
from alpaca.model import check_weights
from alpaca.recipe import rules
from alpaca.recipe.arguments import DataFlags, LoopFlags, compares_evaluations
from alpaca.recipe.steps import Schedule


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
    longest = flags.model_max_length + flags.eval_generation_tokens
    if window and flags.eval_generations and longest > window:
        raise UserError(
            f"--eval_generation_tokens {flags.eval_generation_tokens} after a prompt of "
            f"--model_max_length {flags.model_max_length} is longer than the attention window of "
            f"the model of {folder}, {window} tokens (sliding_window in its config.json).",
            "Lower one of them.",
        )


def check_schedule(flags: LoopFlags, schedule: Schedule) -> None:
    """Raise UserError where a flag compares evaluations, and a run has only one."""
    period = rules.period(flags.eval_strategy, flags.eval_steps, schedule.steps_per_epoch)
    compared = compares_evaluations(flags)
    if compared and period >= schedule.steps:
        raise UserError(
            f"{compared} compares evaluations, but the only one of this run is after the last of "
            f"its {schedule.steps} steps.",
            f"Give --eval_strategy steps and an --eval_steps below {schedule.steps}."
            if schedule.steps > 1
            else "Give more steps.",
        )
