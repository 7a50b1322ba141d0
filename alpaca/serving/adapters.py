"""The adapters that an engine serves beside its base: by name, and what is checked of a folder.

Names change while requests run: a request means the adapter that had its name when it came. So an
adapter that is removed or replaced serves its running requests to their end, and is then freed.
"""

from collections import Counter
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import nn

from alpaca import passport
from alpaca.adapter import Adapter
from alpaca.errors import UserError
from alpaca.folder import load_tokenizer
from alpaca.serving.cache import SlotCache, unused_bytes
from alpaca.serving.forward import SlotModel
from alpaca.serving.lora import LoadedAdapter, device_of, layers_of
from alpaca.serving.packed import BlockedLinear, HalfLinear
from alpaca.tokens import Codec

MOST = 64  # each also keeps keys of the prompts' common beginnings, and is a label of /metrics
LONGEST_NAME = 100  # characters
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


class Named(Protocol):
    """An adapter as requests and metrics know it: as `lora.LoadedAdapter`."""

    name: str
    codec: Codec | None
    requests: int
    created: int

    @property
    def bytes(self) -> int:
        """Memory of its matrices."""


Kind = TypeVar("Kind", bound=Named)


class Adapters(Generic[Kind]):
    """Names of an engine's base and adapters. Any thread may use it; the engine's thread adds."""

    def __init__(self, base: str = "", folder: Path | None = None, default: str = "") -> None:
        """`base` is the name of the model in `folder`, `default` that of requests without one."""
        self.base, self.folder, self.default = base, folder, default
        self._loaded: dict[str, Kind] = {}

    @property
    def loaded(self) -> list[Kind]:
        """All adapters, in the order they came."""
        return list(self._loaded.values())

    @property
    def names(self) -> list[str]:
        """What a request may name, the default first."""
        found = [name for name in (self.base, *self._loaded) if name]
        return sorted(found, key=lambda name: name != self.default)

    def find(self, name: str) -> Kind | None:
        """The adapter that a request means; None is the base.

        Raises:
            UserError: no adapter has that name.
        """
        name = name or self.default
        found = self._loaded.get(name)
        if found is None and name and name != self.base:
            served = ", ".join(self.names) or "only the base"
            raise UserError(f"There is no adapter {name!r} here; served: {served}.")
        return found

    def put(self, adapter: Kind) -> None:
        """Give an adapter its name, which another one may have had."""
        old = self._loaded.get(adapter.name)
        adapter.requests += old.requests if old else 0
        self._loaded[adapter.name] = adapter

    def remove(self, name: str) -> None:
        """Take an adapter's name away.

        Raises:
            UserError: there is none of that name, or requests without a name mean it.
        """
        if name == self.default and name in self._loaded:
            raise UserError(f"{name} answers requests that name no adapter, so it stays.")
        if self._loaded.pop(name, None) is None:
            told = ", ".join(self._loaded) or "none"
            raise UserError(f"There is no adapter {name!r} here; loaded: {told}.")

    def check_name(self, name: str) -> None:
        """Raise UserError for a name that no adapter can have."""
        if not name.strip() or not name.isprintable() or len(name) > LONGEST_NAME:
            raise UserError(
                f"{name[:LONGEST_NAME]!r} cannot be an adapter's name.",
                f"Use 1 to {LONGEST_NAME} printable characters.",
            )
        if name == self.base:
            raise UserError(
                f"{name} is the name of the base, so no adapter can have it.",
                "Give the adapter another name, or rename its folder.",
            )
        if name not in self._loaded and len(self._loaded) >= MOST:
            raise UserError(f"{MOST} adapters are loaded, and no more can be.", "Unload one.")


def examined(
    name: str, folder: Path, adapters: Adapters[Any], codec: Codec
) -> tuple[Adapter, Codec | None]:
    """Check an adapter's name and folder; its own codec, if that differs from the base's.

    Raises:
        UserError: the folder is damaged, or belongs to another base or other templates; or the name
            is taken.
    """
    adapters.check_name(name)
    assert adapters.folder is not None
    adapter = Adapter(folder)
    if adapter.passport is not None:
        passport.check_template(folder, passport.check_loaded(folder))
    adapter.check_base(adapters.folder)
    return adapter, _own_codec(folder, adapters.folder, codec)


def opened(
    name: str,
    folder: Path,
    adapters: Adapters[Any],
    model: SlotModel,
    codec: Codec,
    shared: int = 0,
) -> LoadedAdapter:
    """Read and check an adapter's folder, and prepare its matrices for a served base.

    `codec` is the base's; `shared`: tokens of prefixes that will be computed with the adapter.

    Raises:
        UserError: the folder is damaged, belongs to another base or other templates, or does not
            fit into memory; or the name is taken.
    """
    adapter, own = examined(name, folder, adapters, codec)
    _check_layers(adapter, model.model)
    _check_memory(adapter, model, shared)
    loaded = LoadedAdapter(name, layers_of(adapter, model.model), own)
    print(_summary(adapter, loaded), flush=True)
    for note in _notes(adapter):
        print(f"note: adapter {name}: {note}", flush=True)
    return loaded


def _summary(adapter: Adapter, loaded: LoadedAdapter) -> str:
    ranks = sorted({change.down.shape[1] for change in loaded.layers.values()})
    rank = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    return (
        f"adapter {loaded.name}: {adapter.folder}, rank {rank} in {len(loaded.layers)} layers, "
        f"{adapter.parameters / 1e6:,.1f}M parameters, {loaded.bytes / 2**20:,.1f} MiB"
    )


def _notes(adapter: Adapter) -> list[str]:
    """What its user should know of an adapter that is served nevertheless."""
    found, notes = adapter.passport or {}, []
    if not found.get("base", {}).get("files"):
        notes.append("it records no hashes of its base, so only shapes were compared")
    if quantized := found.get("quantized"):
        notes.append(
            f"it was trained over a base in {quantized}; over this one its answers differ slightly"
        )
    return notes


def _check_layers(adapter: Adapter, model: nn.Module) -> None:
    for name in adapter.modules:
        layer = model.get_submodule(name)
        if not isinstance(layer, nn.Linear | HalfLinear | BlockedLinear):
            raise UserError(
                f"{adapter.folder} changes {name}, a {type(layer).__name__}.",
                "Only linear layers can be changed here.",
            )


def _own_codec(folder: Path, base: Path, codec: Codec) -> Codec | None:
    """The codec of an adapter's own tokenizer files, or None if they are absent or the base's."""
    if not (folder / TOKENIZER[0]).is_file():
        return None
    if all(_content(folder / name) == _content(base / name) for name in TOKENIZER):
        return None
    own = Codec(load_tokenizer(folder))
    if own.tokenizer.get_vocab() != codec.tokenizer.get_vocab() or own.eos != codec.eos:
        raise UserError(
            f"{folder} has a tokenizer with other tokens than that of {base}.",
            "Serve the adapter on the base that it was trained on.",
        )
    return own


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _check_memory(adapter: Adapter, model: SlotModel, shared: int) -> None:
    """Refuse an adapter that would take more than half of the memory that is left."""
    needed: Counter[torch.device] = Counter()
    for name in adapter.modules:
        needed[device_of(model.model.get_submodule(name))] += adapter.bytes_of(name)
    if shared:
        needed.update(prefix_bytes(model.cache, shared))
    for device, size in needed.items():
        left = unused_bytes(device)
        if device.type == "cuda":  # what freed adapters took is torch's to give again
            left += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        if size > left // 2:
            raise UserError(
                f"{adapter.folder} needs {size / 2**20:,.0f} MiB of {device} memory; "
                f"{left / 2**20:,.0f} MiB are left, half of them for computing.",
                "Unload another adapter, or start with fewer ALPACA_SLOTS.",
            )


def prefix_bytes(cache: SlotCache, tokens: int) -> Counter[torch.device]:
    """Memory of the keys and values of this many tokens outside the cache."""
    found: Counter[torch.device] = Counter()
    for part in (part for layer in cache.layers for part in layer):
        found[part.device] += tokens * part[0, 0].nbytes
    return found
