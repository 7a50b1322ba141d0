"""The model card of a trained folder, `README.md`: what its passport says, for people.

Hubs show it, and read its head (YAML). What the passport does not hold, such as the licence of a
data set, is named as missing: nothing is made up.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

from alpaca import atomic, passport, prompt, stored
from alpaca.errors import UserError

NAME = "README.md"
MARK = "<!-- Written by alpaca-cog from passport.json. Without this line it is kept as it is. -->"
LEGAL = re.compile(r"(LICEN[CS]E|NOTICE|USE_POLICY)(\.(txt|md))?", re.IGNORECASE)
ASK = "Name three colors."


def write(folder: Path, base: Path | None = None) -> Path:
    """Write the card of a folder, and copy the base's licence files beside it.

    A card that somebody else has written is kept. `base`: the folder it was trained from.

    Raises:
        UserError: the folder has no passport, or was not trained here.
    """
    path = folder / NAME
    if path.is_file() and MARK not in path.read_text(encoding="utf-8", errors="replace"):
        return path
    recorded = passport.read(folder)
    if recorded is None or "result" not in recorded:
        raise UserError(
            f"{folder} is not the result of a training run: its passport holds none.",
            "Only folders that train.py has finished get a card.",
        )
    if base is not None and base.is_dir():
        for file in base.iterdir():
            if file.is_file() and LEGAL.fullmatch(file.name) and not (folder / file.name).exists():
                shutil.copyfile(file, folder / file.name)
    atomic.write_text(path, text(folder, recorded, licence(base)))
    return path


def licence(base: Path | None) -> str | None:
    """The licence that the base's own card names, if it has one."""
    card = base / NAME if base is not None else None
    if card is None or not card.is_file():
        return None
    head = re.match(r"---\n(.*?)\n---\n", card.read_text(encoding="utf-8", errors="replace"), re.S)
    found = re.search(r"^license: *[\"']?([\w.-]+)", head[1], re.M) if head else None
    return found[1] if found else None


def text(folder: Path, recorded: dict[str, Any], of_base: str | None) -> str:
    """The card, as Markdown."""
    run, result = recorded["run"], recorded["result"]
    base = recorded.get("base", {}).get("folder", "unknown")
    legal = sorted(path.name for path in folder.iterdir() if LEGAL.fullmatch(path.name))
    lora = run.get("lora") if stored.is_adapter(folder) else None
    if lora:
        made = f"A LoRA adapter of rank {lora['rank']} for `{base}`, trained"
    else:
        kind = stored.read_json(folder / "config.json")["model_type"]
        made = f"`{base}` (`{kind}`), fine-tuned"
    return "\n".join(
        [
            "---",
            f"license: {of_base or 'other'}",
            f"base_model: {json.dumps(base)}",
            f"library_name: {'peft' if lora else 'transformers'}",
            "pipeline_tag: text-generation",
            "tags: [alpaca, instruction-following]",
            "---",
            MARK,
            "",
            f"# {folder.resolve().name}",
            "",
            f"{made} {_learned(run)} in the Alpaca format.",
            "",
            "## Licence",
            "",
            _licence(base, of_base, legal),
            "",
            "## How it was trained",
            "",
            *_table(_training(recorded)),
            "",
            "## Losses",
            "",
            *_table(_losses(result)),
            "",
            "## Prompt",
            "",
            "It was trained on exactly this text, which ends with a colon and no space. The chat "
            "template writes it.",
            "",
            "```text",
            prompt.render(ASK),
            "```",
            "",
            "With an input:",
            "",
            "```text",
            prompt.render("Translate to French.", "Good morning."),
            "```",
            "",
            "## Run it",
            "",
            *(_beside_base if lora else _programs)(folder.resolve().name),
            "",
        ]
    )


def _learned(run: dict[str, Any]) -> str:
    """What it was trained for, and on how many examples."""
    if "dpo" in run:
        return f"with DPO on {run['examples']:,} pairs of a preferred and a rejected answer"
    return f"to follow instructions on {run['examples']:,} examples"


def _licence(base: str, of_base: str | None, legal: list[str]) -> str:
    told = [
        f"That of the base model, `{base}`: {of_base}."
        if of_base
        else f"That of the base model, `{base}`, whose folder does not name it."
    ]
    if legal:
        told.append(f"Its files lie here: {', '.join(legal)}.")
    told.append("The data set may have a licence of its own.")
    return " ".join(told)


def _training(recorded: dict[str, Any]) -> list[tuple[str, str]]:
    run, result = recorded["run"], recorded["result"]
    # folders of earlier versions do not say: they were all rounded to the nearest bf16 number
    exported = recorded.get("export", {"dtype": "bf16", "rounding": "nearest"})
    held_out = run["eval_fraction"] or run.get("eval_data_sha256")
    rows = [
        ("data, SHA-256", f"`{run['data_sha256']}`"),
        ("examples", f"{run['examples']:,}" + (", others held out" if held_out else "")),
        ("steps", f"{result['steps']:,} of {run['batch']} examples" + _ending(result)),
        ("learning rate", f"{run['peak']:g}, {run['shape']}, {run['warmup']} steps of warm-up"),
        ("AdamW", f"weight decay {run['weight_decay']:g}, moments {run['moments']}"),
        ("computed in", run["compute"]),
        ("exported as", f"{exported['dtype']}, rounding: {exported['rounding']}"),
        ("longest example", f"{run['model_max_length']} tokens"),
        ("seed", str(run["seed"])),
        ("versions", ", ".join(f"{name} {value}" for name, value in recorded["versions"].items())),
    ]
    if "adapter" in recorded:
        rows.append(("merged from", _merged(recorded["adapter"]["settings"])))
    elif lora := run.get("lora"):
        rows.append(("adapter", _adapter(lora)))
    if dpo := run.get("dpo"):
        smoothing = (
            f", label smoothing {dpo['label_smoothing']:g}" if dpo["label_smoothing"] else ""
        )
        rows.append(("loss", f"DPO against the base, beta {dpo['beta']:g}{smoothing}"))
    changes = recorded.get("changes", [])
    if changes:
        told = "; ".join(f"after step {c['step']} {c['name']} {c['new']}" for c in changes)
        rows.append(("changed on the way", told))
    return rows


def _adapter(lora: dict[str, Any]) -> str:
    """Its settings, in the words of the flags."""
    targets = lora["targets"]
    layers = targets if isinstance(targets, str) else ", ".join(targets)
    more = [name for name in ("rslora", "dora") if lora[name]]
    base = [] if lora["base"] == "no" else [f"base held in {lora['base']}"]
    dropout = [f"dropout {lora['dropout']:g}"] if lora["dropout"] else []
    first = [f"rank {lora['rank']}", f"alpha {lora['alpha']:g}", layers]
    return ", ".join([*first, *more, *dropout, *base])


def _merged(settings: dict[str, Any]) -> str:
    """An adapter's settings, in PEFT's names."""
    kind = "DoRA" if settings.get("use_dora") else "LoRA"
    scaled = " / sqrt(rank)" if settings.get("use_rslora") else " / rank"
    return f"a {kind} adapter, rank {settings['r']}, scale {settings['lora_alpha']:g}{scaled}"


def _ending(result: dict[str, Any]) -> str:
    """Where a run ended before its last planned step, and which weights were exported."""
    told = ""
    if result.get("stopped"):
        told += f"; stopped early: {result['stopped']}"
    if result.get("exported_step") not in (None, result["steps"]):
        told += f"; exported after step {result['exported_step']:,}, the lowest held-out loss"
    return told


def _losses(result: dict[str, Any]) -> list[tuple[str, str]]:
    names = {
        "loss": "training, last step",
        "eval_loss_before": "held out, base model",
        "eval_loss_after": "held out, trained",
        "eval_loss_exported": "held out, this folder",
    }
    if result.get("exported_step") not in (None, result["steps"]):
        names["eval_loss_best"] = f"held out, step {result['exported_step']:,}"
    known = [(label, result.get(key)) for key, label in names.items()]
    return [(label, f"{value:.4f}") for label, value in known if value is not None]


def _table(rows: list[tuple[str, str]]) -> list[str]:
    return ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]


def _beside_base(name: str) -> list[str]:
    body = json.dumps({"input": {"prompt": ASK}})
    return [
        "```sh",
        "# alpaca-cog: beside the base, or merged into it",
        f"python -m alpaca serve --weights {name}",
        "curl -s http://127.0.0.1:5000/predictions -H 'Content-Type: application/json' "
        f"-d '{body}'",
        f"python -m alpaca merge {name} -o {name}-merged",
        "# vLLM, with BASE the folder or name of the base model",
        f"vllm serve BASE --host 127.0.0.1 --enable-lora --lora-modules {name}={name}",
        "```",
        "```python",
        "# peft",
        "from peft import AutoPeftModelForCausalLM",
        f'model = AutoPeftModelForCausalLM.from_pretrained("{name}")',
        "```",
    ]


def _programs(name: str) -> list[str]:
    messages = json.dumps([{"role": "user", "content": ASK}])
    body = json.dumps({"input": {"prompt": ASK}})
    return [
        "```python",
        "# transformers",
        "from transformers import pipeline",
        f'ask = pipeline("text-generation", "{name}")',
        f"print(ask({messages}, max_new_tokens=64, do_sample=False)[0]['generated_text'][-1])",
        "```",
        "```sh",
        "# vLLM",
        f"vllm serve {name} --host 127.0.0.1",
        "# mlx-lm",
        f"mlx_lm.generate --model {name} --prompt {json.dumps(ASK)} --max-tokens 64 --temp 0",
        "# llama.cpp, with alpaca-cog's export",
        f"python -m alpaca export {name} --to gguf -o {name}.gguf && llama-server -m {name}.gguf",
        "# Ollama",
        f"python -m alpaca export {name} --to ollama -o {name}-ollama",
        f"cd {name}-ollama && ollama create {name} -f Modelfile",
        "# alpaca-cog",
        f"python -m alpaca serve --weights {name}",
        "curl -s http://127.0.0.1:5000/predictions -H 'Content-Type: application/json' "
        f"-d '{body}'",
        "```",
    ]
