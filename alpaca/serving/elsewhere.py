"""Answers that are computed elsewhere: by servers at a URL, or by vLLM as a child of this process.

ALPACA_ENGINE_URL names servers of OpenAI's /v1/completions, separated by commas, which serve the
same folder; ALPACA_ENGINE_MODEL the model's name there, ALPACA_ENGINE_KEY their key.
ALPACA_ENGINE=vllm starts `vllm serve`, see `vllm.py`. ALPACA_SLOTS, ALPACA_CONTEXT, ALPACA_DTYPE
and ALPACA_MAX_SECONDS mean what `loading` says.
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
from transformers import AutoConfig

from alpaca import passport
from alpaca.address import base_url
from alpaca.errors import UserError
from alpaca.serving import settings
from alpaca.serving.adapters import Adapters, examined
from alpaca.serving.border import Limits
from alpaca.serving.cache import Capacity
from alpaca.serving.remote import ID, RemoteAdapter, RemoteEngine, Server, headers
from alpaca.serving.settings import URL
from alpaca.serving.stream import token_bytes
from alpaca.serving.vllm import VllmEngine, refuse_what_vllm_lacks
from alpaca.serving.weights import Weights
from alpaca.tokens import Codec

MODEL, KEY = "ALPACA_ENGINE_MODEL", "ALPACA_ENGINE_KEY"
UNCHECKED = "ALPACA_ENGINE_UNCHECKED"
SLOTS = 256  # what vLLM decodes together
WAIT = 2.0  # seconds between questions to a server that is not there yet
DOWN = (502, 503, 504)  # of a balancer, or of a server that is loading
PATIENCE = 600.0  # seconds until a server that does not answer is given up
ROUNDING = 1 / 32  # of the largest logit: what bf16 may change a gap between two by


def connect(
    weights: Weights, codec: Codec, ends: frozenset[int], environment: Mapping[str, str]
) -> RemoteEngine:
    """The engine that the environment asks for; the folder's tokenizer and templates are ours.

    Raises:
        UserError: a server refuses or serves another model, or vLLM does not start.
    """
    began = time.monotonic()
    config = AutoConfig.from_pretrained(weights.folder, local_files_only=True)
    table = token_bytes(codec.tokenizer)
    if len(table) > config.vocab_size:
        raise UserError(
            f"{weights.folder}: the tokenizer has {len(table)} tokens, the model only "
            f"{config.vocab_size}.",
            "They belong to different models; convert or train the folder again.",
        )
    table += [b""] * (config.vocab_size - len(table))
    slots = settings.number(environment, "ALPACA_SLOTS", SLOTS)
    context = min(
        getattr(config, "max_position_embeddings", settings.CONTEXT),
        settings.number(environment, "ALPACA_CONTEXT", settings.CONTEXT),
    )
    seconds = settings.number(environment, "ALPACA_MAX_SECONDS", settings.SECONDS)
    limits = Limits(seconds=seconds)
    adapters: Adapters[RemoteAdapter] = Adapters(
        weights.folder.name, weights.folder, weights.default
    )
    folders: dict[str, Path] = {}
    for name, folder in weights.adapters.items():
        adapter, own = examined(name, folder, adapters, codec)
        if not environment.get(URL):
            refuse_what_vllm_lacks(adapter)
        adapters.put(RemoteAdapter(name, own))
        folders[name] = folder
    engine: RemoteEngine
    if urls := environment.get(URL):
        key = environment.get(KEY, "").strip() or None
        servers, lengths = _found(urls, weights, environment, key)
        capacity = Capacity(slots, min([context, *lengths]))
        engine = RemoteEngine(
            servers, table, ends, capacity, limits=limits, adapters=adapters, key=key
        )
        where = ", ".join(server.url for server in servers)
    else:
        engine = VllmEngine(
            weights.folder,
            table,
            ends,
            Capacity(slots, context),
            limits=limits,
            adapters=adapters,
            folders=folders,
            environment=environment,
        )
        where = f"vLLM ({engine.python})"
    engine.start()
    print(
        f"serving {weights.folder}, taken from {weights.origin}: answers by {where}, ready in "
        f"{time.monotonic() - began:.1f} s; {engine.capacity.slots} requests at once, "
        f"{engine.capacity.length:,} tokens each",
        flush=True,
    )
    return engine


def _found(
    urls: str, weights: Weights, environment: Mapping[str, str], key: str | None
) -> tuple[list[Server], list[int]]:
    """The servers, which list the model and the adapters; and the longest requests they take."""
    servers, lengths = [], []
    for text in filter(None, (part.strip() for part in urls.split(","))):
        url = base_url(text, URL)
        known = _listed(url, key)
        first = next(iter(known), "")
        name = environment.get(MODEL) or first
        missing = [one for one in (name, *weights.adapters) if one not in known]
        if missing:
            raise UserError(
                f"{url} does not serve {missing[0] or 'a model'}; it lists "
                f"{', '.join(known) or 'none'}.",
                f"Set {MODEL} to the model's name there, and load adapters there under the names "
                "that they have here.",
            )
        if not environment.get(UNCHECKED):
            check_weights(url, name, weights.folder, key)
            for adapter, folder in weights.adapters.items():
                check_weights(url, adapter, folder, key)
        servers.append(Server(url, name))
        if length := known[name]:
            lengths.append(length)
    return servers, lengths


def check_weights(url: str, model: str, folder: Path, key: str | None) -> None:
    """Refuse a server whose answers' first tokens have other odds than the folder's passport keeps.

    Compared are the gaps between the logits of its golden prompts, which log probabilities keep.

    Raises:
        UserError: they differ by more than rounding makes them.
    """
    unchecked = f"note: whether {url} serves the weights of {folder} was not checked:"
    kept = (passport.read(folder) or {}).get("golden")
    if not kept:
        print(unchecked, "the folder's passport keeps no logits", flush=True)
        return
    asked = {"model": model, "max_tokens": 1, "temperature": 0, "return_tokens_as_token_ids": True}
    for one in kept:
        logits: dict[str, float] = one["logits"]
        body = {**asked, "prompt": one["ids"], "logprobs": len(logits)}
        try:
            answer = httpx.post(f"{url}/completions", json=body, headers=headers(key), timeout=300)
            told = answer.raise_for_status().json()["choices"][0]["logprobs"]["top_logprobs"][0]
            found = {name.removeprefix(ID): value for name, value in told.items() if ID in name}
        except (httpx.HTTPError, ValueError, TypeError, LookupError) as error:
            print(unchecked, repr(error), flush=True)
            return
        if not found:
            print(unchecked, "it tells no ids of likely tokens", flush=True)
            return
        first, least = max(logits, key=lambda name: logits[name]), min(found.values())
        differences = []
        for name, logit in logits.items():
            gap = found.get(name, least) - found.get(first, least) - logit + logits[first]
            # of a token that is not told, only the most that it may have is known
            differences.append(abs(gap) if name in found else max(0.0, -gap))
        if first not in found or max(differences) > ROUNDING * max(map(abs, logits.values())):
            raise UserError(
                f"{url} serves other weights than {folder}: it begins an answer with other odds "
                f"than the folder's passport keeps ({one['instruction']}).",
                "Serve the same folder at both places. Where one is quantized on purpose, set "
                f"{UNCHECKED}=1.",
            )


def _listed(url: str, key: str | None) -> dict[str, int]:
    """The models of a server, each with its context (0: not told); waits for it to come up."""
    deadline = time.monotonic() + PATIENCE
    told = False
    while (found := listed(url, key, KEY, DOWN)) is None:
        if time.monotonic() > deadline:
            raise UserError(f"{url} does not answer.", f"Start it, or correct {URL}.")
        if not told:
            print(f"waiting for {url}", flush=True)
            told = True
        time.sleep(WAIT)
    return {name: _length(one) for name, one in found.items()}


def _length(model: dict[str, Any]) -> int:
    """As vLLM's list of models tells it, or Ray Serve's."""
    metadata = model.get("metadata") or {}
    return int(model.get("max_model_len") or metadata.get("max_request_context_length") or 0)


def listed(
    url: str, key: str | None, setting: str, down: Sequence[int]
) -> dict[str, dict[str, Any]] | None:
    """What a server's /models tells of each, by id; None if it is not there yet.

    It is not there if it cannot be reached or answers with a status of `down`.

    Raises:
        UserError: it refuses the key, which `setting` holds, or lists no models.
    """
    try:
        answer = httpx.get(f"{url}/models", headers=headers(key), timeout=10)
    except httpx.TransportError:
        return None
    if answer.status_code in down:
        return None
    if answer.status_code in (401, 403):
        raise UserError(f"{url} refused.", f"Set {setting} to a key that it accepts.")
    try:
        return {one["id"]: one for one in answer.raise_for_status().json()["data"]}
    except (httpx.HTTPStatusError, ValueError, TypeError, KeyError):
        raise UserError(
            f"{url}/models lists no models (HTTP status {answer.status_code}).",
            "The address of an OpenAI-compatible server usually ends in /v1.",
        ) from None
