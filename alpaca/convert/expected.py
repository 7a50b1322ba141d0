"""Compare the tensors of a source with those that transformers expects for its config.

The model is built on the meta device, from shapes alone: even 405B is quick and takes no memory.
"""

from copy import deepcopy
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from alpaca.convert.source import Source
from alpaca.errors import UserError


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a model with this config; tied tensors count once."""
    # A deep copy, because transformers modifies the dictionaries it is given.
    settings = deepcopy(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings))
    found = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    if config["tie_word_embeddings"]:
        found.pop("lm_head.weight", None)
    return found


def check_fit(source: Source) -> None:
    """Raise UserError unless a source has exactly the tensors that its config implies."""
    wanted = shapes(source.config)
    given = {tensor.name: tensor.shape for tensor in source.tensors}
    for name in sorted(set(wanted) | set(given)):
        if wanted.get(name) != given.get(name):
            raise UserError(
                f"{name} has shape {list(given.get(name, ()))} in the weights, but "
                f"{list(wanted.get(name, ()))} by the configuration.",
                "The files are damaged, or belong to different models.",
            )
