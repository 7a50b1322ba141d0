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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from alpaca import passport, stored
from alpaca.errors import UserError

CONFIG = stored.ADAPTER
WEIGHTS = stored.ADAPTER_WEIGHTS
ROOT = "base_model.model."  # in PEFT's names, before the module's name in the base model
FOREIGN = "Merge it into its base with the program that made it."

# Settings that are read here or change nothing once an adapter is trained.
READ = {
    "peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern",
    "bias", "base_model_name_or_path",
}  # fmt: skip
HARMLESS = {
    "task_type", "auto_mapping", "peft_version", "revision", "inference_mode", "target_modules",
    "exclude_modules", "lora_dropout", "layers_to_transform", "layers_pattern", "megatron_core",
    "qalora_group_size", "eva_config", "ensure_weight_tying",
}  # fmt: skip
# Beginnings of `init_lora_weights` under which peft changes the base's weights.
CHANGES_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")


@dataclass(frozen=True)
class Change:
    """What an adapter adds to one linear layer; fp32.

    down: A, (rank, in); up: B, (out, rank); magnitude: DoRA's row lengths, (out,), or None.
    """

    down: Tensor
    up: Tensor
    scaling: float
    magnitude: Tensor | None = None

    def merged(self, weight: Tensor) -> Tensor:
        """The adapted weight, in the type of `weight`: (out, in), fp32 or fp64."""
        kind = weight.dtype
        whole = weight + self.scaling * (self.up.to(kind) @ self.down.to(kind))
        if self.magnitude is not None:
            whole *= self.row_factors(weight)[:, None]
        return whole

    def row_factors(self, weight: Tensor) -> Tensor:
        """DoRA's factor of each row of W + s B A, (out,), in the type of `weight`."""
        assert self.magnitude is not None
        kind = weight.dtype
        whole = weight + self.scaling * (self.up.to(kind) @ self.down.to(kind))
        factors: Tensor = self.magnitude.to(kind) / torch.linalg.norm(whole, dim=1)
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
        self.modules = _modules(folder, self._entries, dora=bool(self.config.get("use_dora")))

    @property
    def base_name(self) -> str:
        """The base model's folder or name, as the adapter's maker wrote it; may be empty."""
        return str(self.config.get("base_model_name_or_path") or "")

    @property
    def parameters(self) -> int:
        """Number of trained numbers."""
        return sum(entry.elements for entry in self._entries.values())

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
        dora = self.config.get("use_dora")
        magnitude = self._tensor(f"{name}.lora_magnitude_vector") if dora else None
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

    def check_base(self, base: Path, weights: Mapping[str, stored.Entry] | None = None) -> None:
        """Refuse a base model that this adapter was not trained on.

        `weights`: the base's tensors, if the caller has read them. Without hashes of its base in
        the passport, only the shapes are compared.

        Raises:
            UserError: a layer is absent or has another shape, or a file has another hash.
        """
        weights = stored.tensors(base) if weights is None else weights
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
        recorded = (self.passport or {}).get("base", {}).get("files")
        if recorded and _weights(recorded) != _weights(base_files(base)):
            raise UserError(
                f"{self.folder} was trained on other weights than those in {base}.", self._where()
            )

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
    paths = sorted(path for path in base.iterdir() if path.is_file())
    hashes = passport.hash_files(paths)
    return {path.name: value for path, value in zip(paths, hashes, strict=True)}


def _weights(files: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in files.items() if name.endswith(".safetensors")}


is_adapter = stored.is_adapter


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
    for name in ("r", "lora_alpha"):
        if not isinstance(config.get(name), int | float) or config[name] <= 0:
            raise UserError(f"{path}: {name} is {config.get(name)!r}.", "Train the adapter again.")
    return config


def _of_pattern(config: dict[str, Any], key: str, module: str, default: Any) -> Any:
    """The value that a pattern gives to a module, as peft matches names; else the default."""
    for pattern, value in (config.get(key) or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            return value
    return default


def _entries(folder: Path) -> dict[str, stored.Entry]:
    path = folder / WEIGHTS
    if not path.is_file():
        raise UserError(
            f"{path} is missing.",
            "Copy the folder again; an adapter_model.bin can be saved anew with peft.",
        )
    stored.check_pointer(path)
    return stored.header(path)


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
