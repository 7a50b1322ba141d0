"""Loads a model folder, starts an engine that serves it, and prints one line about it.

Environment variables: ALPACA_SLOTS (requests decoded together) and ALPACA_CONTEXT (most tokens of
one request) set the size of the cache; ALPACA_DTYPE (float32, bfloat16) overrides the compute
type; ALPACA_MAX_SECONDS ends answers that take longer.
"""

import os
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from transformers import PreTrainedModel

from alpaca import model as model_folder
from alpaca import passport, stored
from alpaca.errors import UserError
from alpaca.folder import check_folder, load_tokenizer
from alpaca.serving import border, elsewhere, settings
from alpaca.serving.adapters import Adapters, opened
from alpaca.serving.border import Limits
from alpaca.serving.cache import PAGE, fitting_tokens, plan_capacity, unused_bytes
from alpaca.serving.engine import Engine
from alpaca.serving.forward import SlotModel
from alpaca.serving.graphs import GraphModel
from alpaca.serving.lora import LoadedAdapter
from alpaca.serving.stream import token_bytes
from alpaca.serving.weights import Weights
from alpaca.tokens import Codec

SLOTS = {"cpu": 16, "cuda": 64}
PIECE_TOKENS = {"cpu": 128, "cuda": 512}  # prompt tokens per step; they about double its cost
MIN_SLOTS = 5  # the n completions of a request are decoded together, and n is at most 5


def load(
    weights: Weights, environment: Mapping[str, str] = os.environ
) -> tuple[border.Engine, Codec]:
    """Load a model folder and start its engine.

    Loading runs in a thread that ends afterwards, because GNU OpenMP keeps a pool for each thread
    that computes. If all pools together have more threads than the machine has cores, they sleep
    between operations (libgomp, throttled spin count), and decoding took 1.4 to 1.8 times as long.

    Raises:
        UserError: the folder is incomplete, was made for other templates, or does not fit.
    """
    with ThreadPoolExecutor(max_workers=1) as own_thread:
        return own_thread.submit(_load, weights, environment).result()


def _load(weights: Weights, environment: Mapping[str, str]) -> tuple[border.Engine, Codec]:
    began = time.monotonic()
    folder = weights.folder
    codec = checked(folder)
    if settings.has_other_engine(environment):
        return elsewhere.connect(weights, codec, end_ids(folder, codec), environment), codec
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = _dtype(environment, device)
    # On a CPU, load the checkpoint's own type: packing converts one layer at a time.
    read_as = None if device.type == "cpu" else dtype
    spread = _device_map(folder, device)
    if spread == "auto":
        print("serve: the GPUs compute one after another; ALPACA_ENGINE=vllm uses them together")
    loaded = model_folder.load_model(folder, read_as, spread)
    check_tokenizer(loaded, codec, folder)
    parameters = loaded.num_parameters()  # packed layers have none
    engine = make_engine(loaded, codec, environment, dtype, weights)
    what = f"{type(loaded).__name__}, {parameters / 1e6:,.1f}M parameters"
    wanted = _slots(environment, engine.model.device.type)
    print(_summary(weights, what, engine, time.monotonic() - began, wanted), flush=True)
    return engine, codec


def make_engine(
    loaded: PreTrainedModel,
    codec: Codec,
    environment: Mapping[str, str] = os.environ,
    dtype: torch.dtype | None = None,
    weights: Weights | None = None,
) -> Engine:
    """Allocate the cache and start serving a loaded model, which is changed in place.

    The engine computes in `dtype`, by default in the model's own type. `weights` says which folder
    the model is from, and which adapters are served beside it.
    """
    ends = _ends(loaded.generation_config.eos_token_id, codec)
    devices = {parameter.device for parameter in loaded.parameters()}
    one_gpu = len(devices) == 1 and devices.pop().type == "cuda"
    model = (GraphModel if one_gpu else SlotModel)(loaded, dtype)
    adapters: Adapters[LoadedAdapter] = Adapters()
    if weights is not None:
        adapters = Adapters(weights.folder.name, weights.folder, weights.default)
        for name, folder in weights.adapters.items():
            adapters.put(opened(name, folder, adapters, model, codec))
    kind = model.device.type
    shapes = model.probe()
    slots = _slots(environment, kind)
    context = min(model.context, settings.number(environment, "ALPACA_CONTEXT", settings.CONTEXT))
    tokens = fitting_tokens(shapes)
    page = PAGE if model.flash else 1
    model.allocate(shapes, plan_capacity(tokens, context, slots, min(slots, MIN_SLOTS), page))
    seconds = settings.number(environment, "ALPACA_MAX_SECONDS", settings.SECONDS)
    limits = Limits(prefill_tokens=PIECE_TOKENS[kind], seconds=seconds)
    engine = Engine(model, token_bytes(codec.tokenizer), ends, limits, adapters)
    engine.start(shared_prefixes(codec))
    return engine


def checked(folder: Path) -> Codec:
    """The codec of a model folder, which is whole and was made for these templates.

    Raises:
        UserError: it is not.
    """
    check_folder(folder)
    passport.check_template(folder, passport.check_loaded(folder))
    return Codec(load_tokenizer(folder))


def shared_prefixes(codec: Codec) -> list[list[int]]:
    """The token prefix that all prompts of a template share, for each template."""
    probes = ("a", "Z", "1", "\n", " ", "é", "ก")  # first characters of all kinds
    prefixes = []
    for given in ("", "x"):
        prompts = [codec.prompt(probe, given) for probe in probes]
        same = [len(set(tokens)) == 1 for tokens in zip(*prompts, strict=False)]
        prefixes.append(prompts[0][: [*same, False].index(False)])
    return prefixes


def check_tokenizer(loaded: PreTrainedModel, codec: Codec, folder: Path) -> None:
    """Refuse a tokenizer with more tokens than the model has embedding rows."""
    rows, tokens = loaded.get_input_embeddings().weight.shape[0], len(codec.tokenizer)
    if tokens > rows:
        raise UserError(
            f"{folder}: the tokenizer has {tokens} tokens, the model only {rows}.",
            "They belong to different models; convert or train the folder again.",
        )


def end_ids(folder: Path, codec: Codec) -> frozenset[int]:
    """EOS, and the other end tokens of the folder's generation settings."""
    generation = folder / "generation_config.json"
    source = generation if generation.is_file() else folder / "config.json"
    return _ends(stored.read_json(source).get("eos_token_id"), codec)


def _ends(named: int | list[int] | None, codec: Codec) -> frozenset[int]:
    return frozenset([codec.eos, *(named if isinstance(named, list) else [named])]) - {None}


def _dtype(environment: Mapping[str, str], device: torch.device) -> torch.dtype:
    named = settings.dtype(environment)
    if named is None:
        return model_folder.compute_dtype(device)
    return torch.float32 if named == "float32" else torch.bfloat16


def _device_map(folder: Path, device: torch.device) -> str | None:
    """The first GPU if the weights fill at most half of its free memory; else all GPUs."""
    if device.type == "cpu":
        return None
    size = sum(path.stat().st_size for path in stored.weight_files(folder))
    if torch.cuda.device_count() > 1 and size > unused_bytes(torch.device("cuda", 0)) / 2:
        return "auto"
    return "cuda:0"


def _slots(environment: Mapping[str, str], kind: str) -> int:
    """The number of slots wanted on a kind of device; fewer may fit into memory."""
    return settings.number(environment, "ALPACA_SLOTS", SLOTS[kind])


def _summary(weights: Weights, what: str, engine: Engine, seconds: float, wanted: int) -> str:
    model, capacity = engine.model, engine.capacity
    short = capacity.slots < wanted
    more = f"; up to {wanted:,} with a lower ALPACA_CONTEXT" if short else ""
    kind = str(model.model.dtype).removeprefix("torch.")
    packing_note = " (weights held in 16 bits)" if model.fp16_layers else ""
    left = unused_bytes(model.device) / 2**30
    default = f" with adapter {weights.default} by default" if weights.default else ""
    return (
        f"serving {weights.folder}{default}, taken from {weights.origin}: {what}, "
        f"{kind}{packing_note} on "
        f"{model.device}, ready in {seconds:.1f} s; {capacity.slots} slots of "
        f"{capacity.length:,} tokens ({capacity.tokens:,} in all{more}), {left:.1f} GiB of memory "
        "to spare"
    )
