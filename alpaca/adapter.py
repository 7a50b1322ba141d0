"""LoRA adapters in PEFT's format: which changes a folder holds, and the weights with them merged.

Such a folder holds `adapter_config.json` and `adapter_model.safetensors`. For a linear layer with
weight W it has two small matrices A (rank, in) and B (out, rank); the adapted layer computes
(W + s B A) x (Hu et al., "LoRA", 2021), with s = alpha / rank, or alpha / sqrt(rank) for rsLoRA
(Kalajdzievski, 2023). DoRA (Liu et al., 2024) also sets the length of each row of the sum.

Settings that change the result and are not computed here are refused, and so are tensors that the
settings do not explain. A folder written by this program names its base by the hashes of the weight
files; for any other, only the shapes can be compared.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

from alpaca import passport, stored
from alpaca.errors import UserError

CONFIG = stored.ADAPTER
WEIGHTS = stored.ADAPTER_WEIGHTS
ROOT = "base_model.model."  # in PEFT's names, before the module's name in the base model
FOREIGN = "Merge it into its base with the program that made it."

# Settings that are read here or change nothing once an adapter is trained.
READ = {
    "peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern",
    "bias", "base_model_name_or_path", "target_modules", "exclude_modules", "layers_to_transform",
}  # fmt: skip
HARMLESS = {
    "task_type", "auto_mapping", "peft_version", "revision", "inference_mode", "lora_dropout",
    "layers_pattern", "megatron_core", "qalora_group_size", "eva_config", "ensure_weight_tying",
}  # fmt: skip
# Beginnings of `init_lora_weights` under which peft changes the base's weights.
CHANGES_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")


@dataclass(frozen=True)
class Change:
    """What an adapter adds to one linear layer; fp32, or fp64.

    down: A, (rank, in); up: B, (out, rank); magnitude: DoRA's row lengths, (out,), or None.
    """

    down: Tensor
    up: Tensor
    scaling: float
    magnitude: Tensor | None = None

    def merged(self, weight: Tensor) -> Tensor:
        """The adapted weight, in the type of `weight`: (out, in), fp32 or fp64."""
        whole = self._sum(weight)
        return whole if self.magnitude is None else whole * self._factors(whole)[:, None]

    def row_factors(self, weight: Tensor) -> Tensor:
        """DoRA's factor of each row of W + s B A, (out,), in the type of `weight`."""
        return self._factors(self._sum(weight))

    def rows(self, rows: slice) -> "Change":
        """The change of some rows of the weight."""
        magnitude = None if self.magnitude is None else self.magnitude[rows]
        return replace(self, up=self.up[rows], magnitude=magnitude)

    def double(self) -> "Change":
        """The same in fp64."""
        magnitude = None if self.magnitude is None else self.magnitude.double()
        return replace(self, down=self.down.double(), up=self.up.double(), magnitude=magnitude)

    def _sum(self, weight: Tensor) -> Tensor:
        kind = weight.dtype
        return weight + self.scaling * (self.up.to(kind) @ self.down.to(kind))

    def _factors(self, whole: Tensor) -> Tensor:
        assert self.magnitude is not None
        factors: Tensor = self.magnitude.to(whole.dtype) / torch.linalg.norm(whole, dim=1)
        return factors

    @property
    def rank(self) -> int:
        """The inner dimension."""
        return self.down.shape[0]


class Adapter:
    """A folder in PEFT's format. Tensors are read when they are used."""

    def __init__(self, folder: Path) -> None:
        """Read settings and headers.

        Raises:
            UserError: no adapter, a damaged one, or one whose effect is not computed here.
        """
        self.folder = folder
        self.config = read_config(folder)
        self.passport = passport.read(folder)
        self._entries = _entries(folder)
        self.modules = _modules(folder, self._entries, dora=self.is_dora)
        for module in self.modules:
            self._check_settings(module)

    def _check_settings(self, module: str) -> None:
        """Refuse a layer whose rank is another than the settings', or that they leave out."""
        config, held = self.config, self._entries[f"{ROOT}{module}.lora_A.weight"].shape[0]
        rank = _of_pattern(config, "rank_pattern", module, config["r"])
        if held != rank:
            raise UserError(
                f"{self.folder / CONFIG} gives {module} rank {rank:g}; its matrices have {held}.",
                "Copy the folder again: its files do not belong together.",
            )
        targets, excluded = config.get("target_modules"), config.get("exclude_modules")
        layers = config.get("layers_to_transform")
        numbers = re.findall(r"\.(\d+)\.", module)[:1]
        if (
            (targets and targets != "all-linear" and not _is_named(targets, module))
            or (excluded and _is_named(excluded, module))
            or (layers is not None and not {*map(int, numbers)} & _numbers(layers))
        ):
            raise UserError(
                f"{self.folder / CONFIG} leaves {module} out, which {WEIGHTS} changes.",
                "Copy the folder again: its files do not belong together.",
            )

    @property
    def base_name(self) -> str:
        """The base model's folder or name, as the adapter's maker wrote it; may be empty."""
        return str(self.config.get("base_model_name_or_path") or "")

    @property
    def parameters(self) -> int:
        """Number of trained numbers."""
        return sum(entry.elements for entry in self._entries.values())

    @property
    def rank(self) -> int:
        """The largest rank of its layers."""
        names = (f"{ROOT}{module}.lora_A.weight" for module in self.modules)
        return max(self._entries[name].shape[0] for name in names)

    @property
    def is_dora(self) -> bool:
        """Whether it changes the lengths of rows too."""
        return bool(self.config.get("use_dora"))

    def bytes_of(self, module: str) -> int:
        """Memory of a linear layer's change in fp32."""
        name = f"{ROOT}{module}."
        return 4 * sum(e.elements for key, e in self._entries.items() if key.startswith(name))

    def change(self, module: str) -> Change | None:
        """The change of a linear layer, by its name in the base model; None: it has none."""
        if module not in self.modules:
            return None
        name = f"{ROOT}{module}"
        down = self._tensor(f"{name}.lora_A.weight")
        up = self._tensor(f"{name}.lora_B.weight")
        magnitude = self._tensor(f"{name}.lora_magnitude_vector") if self.is_dora else None
        return Change(down, up, self.scaling(module, down.shape[0]), magnitude)

    def changes(self) -> Iterator[tuple[str, Change]]:
        """Each linear layer's name in the base model, with its change."""
        for module in self.modules:
            change = self.change(module)
            assert change is not None
            yield module, change

    def scaling(self, module: str, rank: int) -> float:
        """The factor of B A in one layer."""
        alpha = float(_of_pattern(self.config, "alpha_pattern", module, self.config["lora_alpha"]))
        return alpha / math.sqrt(rank) if self.config.get("use_rslora") else alpha / rank

    def check_base(
        self,
        base: Path,
        weights: Mapping[str, stored.Entry] | None = None,
        hashes: Mapping[str, str] | None = None,
    ) -> None:
        """Refuse a base model that this adapter was not trained on.

        `weights`: the base's tensors, if the caller has read them. `hashes`: SHA-256 of its files,
        if the caller has computed them; by default they are those in its passport. Without hashes
        of its base in the adapter's passport, only the shapes are compared.

        Raises:
            UserError: a layer is absent, tied to the embedding or has another shape, or a file has
                another hash.
        """
        weights = stored.tensors(base) if weights is None else weights
        if "lm_head" in self.modules and stored.is_tied(stored.read_json(base / "config.json")):
            raise UserError(
                f"{self.folder} changes the output matrix (lm_head), which is the embedding in "
                f"{base}: one matrix cannot be both.",
                "Train it again without lm_head among its target_modules.",
            )
        for module in self.modules:
            name = f"{ROOT}{module}"
            _, wide = self._entries[f"{name}.lora_A.weight"].shape
            out = self._entries[f"{name}.lora_B.weight"].shape[0]
            found = weights.get(f"{module}.weight")
            if found is None or found.shape != (out, wide):
                has = f"has shape {list(found.shape)}" if found else "does not exist"
                raise UserError(
                    f"{self.folder} was not trained on {base}: {module}.weight {has} there, and "
                    f"the adapter changes one of shape {[out, wide]}.",
                    self._where(),
                )
        recorded = self.base_files
        if not recorded:
            return
        own = base_files(base) if hashes is None else hashes
        if _weights(recorded) != _weights(own):
            raise UserError(
                f"{self.folder} was trained on other weights than those in {base}.", self._where()
            )
        settings = "config.json"
        if settings in recorded and recorded[settings] != own.get(settings):
            raise UserError(
                f"{self.folder} was trained with another {settings} than that in {base}.",
                self._where(),
            )

    @property
    def base_files(self) -> dict[str, str]:
        """SHA-256 of the base's files, by name, if the passport has them; else empty."""
        files: dict[str, str] = (self.passport or {}).get("base", {}).get("files") or {}
        return files

    @property
    def quantized(self) -> str | None:
        """How the base's weights were quantized while the adapter was trained, if they were."""
        return (self.passport or {}).get("quantized")

    def _where(self) -> str:
        return f"It was trained on {self.base_name}." if self.base_name else "Name its own base."

    def _tensor(self, name: str) -> Tensor:
        with safe_open(self._entries[name].path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(name).float()
        if not bool(tensor.isfinite().all()):
            raise UserError(
                f"{self.folder}: {name} holds NaN or infinite numbers.", "Train the adapter again."
            )
        return tensor


def base_files(base: Path) -> dict[str, str]:
    """Name and SHA-256 of each file of a base model: from its passport, else computed here."""
    found = passport.read(base)
    if found is not None:
        files: dict[str, str] = found["files"]
        return files
    return hashed(base)


def hashed(folder: Path) -> dict[str, str]:
    """Name and SHA-256 of each file in a folder, computed now."""
    paths = sorted(path for path in folder.iterdir() if path.is_file())
    total = sum(path.stat().st_size for path in paths)
    with tqdm(total=total, unit="B", unit_scale=True, desc="hashing", disable=None) as bar:
        hashes = passport.hash_files(paths, bar.update)
    return {path.name: value for path, value in zip(paths, hashes, strict=True)}


def _weights(files: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in files.items() if name.endswith(".safetensors")}


def read_config(folder: Path) -> dict[str, Any]:
    """The settings of an adapter; refuses those whose effect is not computed here."""
    path = folder / CONFIG
    if not path.is_file():
        raise UserError(f"{folder} holds no adapter (no {CONFIG}).", "Name an adapter's folder.")
    config = stored.read_json(path)
    if config.get("peft_type") != "LORA":
        raise UserError(f"{path}: {config.get('peft_type')} is not LoRA.", FOREIGN)
    if config.get("bias", "none") != "none":
        raise UserError(f"{path}: bias {config['bias']!r} changes the base's biases.", FOREIGN)
    start = str(config.get("init_lora_weights", True)).lower()
    if start.startswith(CHANGES_BASE):
        raise UserError(
            f"{path}: init_lora_weights {config['init_lora_weights']!r} changes the base's weights "
            "before training.",
            "Convert it to plain LoRA with peft (save_pretrained with "
            "path_initial_model_for_weight_conversion).",
        )
    for name, value in config.items():
        if value and name not in READ | HARMLESS | {"init_lora_weights"}:
            raise UserError(f"{path}: {name} {value!r} is not supported here.", FOREIGN)
    for name, good in CHECKS.items():
        if not good(config.get(name)):
            raise UserError(f"{path}: {name} is {config.get(name)!r}.", "Train the adapter again.")
    return config


def _positive(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value) and value > 0


def _is_switch(value: Any) -> bool:
    return value is None or isinstance(value, bool)


def _is_pattern(value: Any) -> bool:
    """Whether it gives a positive number to names by regular expressions."""
    if not isinstance(value, dict):
        return value is None
    try:
        for key in value:
            re.compile(key)
    except re.error:
        return False
    return all(map(_positive, value.values()))


def _is_names(value: Any) -> bool:
    """Whether it names modules: by a regular expression, or in a list."""
    if isinstance(value, str):
        return _is_pattern({value: 1})
    return value is None or (isinstance(value, list) and all(isinstance(one, str) for one in value))


def _is_layers(value: Any) -> bool:
    listed = value if isinstance(value, list) else [value]
    return value is None or all(type(one) is int for one in listed)


CHECKS: dict[str, Callable[[Any], bool]] = {
    "r": _positive,
    "lora_alpha": _positive,
    "use_rslora": _is_switch,
    "use_dora": _is_switch,
    "rank_pattern": _is_pattern,
    "alpha_pattern": _is_pattern,
    "target_modules": _is_names,
    "exclude_modules": _is_names,
    "layers_to_transform": _is_layers,
}


def _of_pattern(config: dict[str, Any], key: str, module: str, default: Any) -> Any:
    """The value that a pattern gives to a module, as peft matches names; else the default."""
    for pattern, value in (config.get(key) or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            return value
    return default


def _is_named(names: Any, module: str) -> bool:
    """Whether settings name a module, as peft matches them: by a pattern, or by ends of names."""
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def _numbers(layers: Any) -> set[int]:
    return {layers} if isinstance(layers, int) else {*layers}


def _entries(folder: Path) -> dict[str, stored.Entry]:
    path = folder / WEIGHTS
    if not path.is_file():
        raise UserError(
            f"{path} is missing.",
            "Copy the folder again; an adapter_model.bin can be saved anew with peft.",
        )
    stored.check_pointer(path)
    found = stored.header(path)
    stored.check_types(found)
    return found


def _modules(folder: Path, entries: Mapping[str, stored.Entry], *, dora: bool) -> list[str]:
    """Names of the changed linear layers, once every tensor is accounted for."""
    ends = [".lora_A.weight", ".lora_B.weight", *([".lora_magnitude_vector"] if dora else [])]
    modules = {name.removeprefix(ROOT).removesuffix(ends[0]) for name in entries if ends[0] in name}
    wanted = {f"{ROOT}{module}{end}" for module in modules for end in ends}
    if unknown := sorted(set(entries) ^ wanted):
        what = "does not belong to a LoRA of linear layers"
        raise UserError(
            f"{folder / WEIGHTS}: {unknown[0]} {what if unknown[0] in entries else 'is missing'}.",
            FOREIGN,
        )
    if not modules:
        raise UserError(f"{folder / WEIGHTS} holds no tensors.", "Copy the folder again.")
    for module in modules:
        _check_shapes(folder, module, [entries[f"{ROOT}{module}{end}"].shape for end in ends])
    return sorted(modules)


def _check_shapes(folder: Path, module: str, shapes: list[tuple[int, ...]]) -> None:
    down, up, *rest = shapes
    fits = len(down) == len(up) == 2 and down[0] == up[1] and down[0] > 0
    if not fits or any(shape != (up[0],) for shape in rest):
        raise UserError(
            f"{folder / WEIGHTS}: the matrices of {module} do not fit each other: {shapes}.",
            "Copy the folder again.",
        )
