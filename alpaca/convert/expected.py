"""What transformers expects to find in a folder with this config: a second opinion on ours.

The model is built on the meta device, from shapes alone, so even 405B takes a moment and no memory.
"""

from copy import deepcopy
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from alpaca.convert.source import Source
from alpaca.errors import UserError


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a model of this config has; tied ones once."""
    # A copy all the way down: transformers writes into the dictionaries it is given.
    settings = deepcopy(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings))
    held = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    if config["tie_word_embeddings"]:
        held.pop("lm_head.weight", None)
    return held


def check_fit(source: Source) -> None:
    """Raise UserError unless the tensors of a source are those its config asks for."""
    wanted = shapes(source.config)
    given = {tensor.name: tensor.shape for tensor in source.tensors}
    for name in sorted(set(wanted) | set(given)):
        if wanted.get(name) != given.get(name):
            raise UserError(
                f"{name} is {list(given.get(name, ()))} in the weights, "
                f"{list(wanted.get(name, ()))} by the configuration.",
                "The files are damaged, or not of one model.",
            )
