"""How long exports and diffs take, compared with copying the same bytes; peak memory; the 2023 way.

Writes a synthetic LLaMA 1 7B (13.5 GB in bf16; with fewer --gigabytes it has fewer layers) and a
tuned one, whose weights differ by --change (norm, relative). Then it times, in one run, `cp` with
reading the copy back; a GGUF export, `diff make` and `diff apply`; with --way-of-2023 also adding a
float difference with whole models in memory, as published then. The page cache is dropped before
each part. Needs four times the size on disk. Last line: JSON.

    python bench/release.py [--gigabytes 13.5] [--folder /tmp] [--way-of-2023]
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from convert import DIM, LAYERS, ROOT, VOCAB, WIDTH, Memory, read_through, run, timed

WHOLE = 13.5
SHARD = 5_000_000_000
WAY_OF_2023 = """
import sys, torch
from transformers import AutoModelForCausalLM
base, diff, out = sys.argv[1:]
model, raw = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
              for folder in (diff, base))
tuned, raw = model.state_dict(), raw.state_dict()
for name in tuned:
    tuned[name].add_(raw[name])
total = sum(value.sum() for value in tuned.values())
model.save_pretrained(out)
"""


def main() -> None:
    """Make the folders, time all parts, print one JSON line."""
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument("--gigabytes", type=float, default=WHOLE)
    options.add_argument("--change", type=float, default=0.004)
    options.add_argument("--folder", type=Path, default=None, help="on the disk to measure")
    options.add_argument("--way-of-2023", action="store_true")
    given = options.parse_args()
    layers = max(1, round(LAYERS * given.gigabytes / WHOLE))
    with tempfile.TemporaryDirectory(dir=given.folder, prefix="bench-release-") as name:
        print(json.dumps(measure(Path(name), layers, given.change, given.way_of_2023)))


def measure(folder: Path, layers: int, change: float, old: bool) -> dict[str, object]:
    """Times and ratios."""
    base, tuned = folder / "base", folder / "tuned"
    make_models(base, tuned, layers, change)
    size = sum(path.stat().st_size for path in tuned.glob("*.safetensors"))
    print(f"{size / 1e9:.1f} GB, {layers} layers", file=sys.stderr)
    copy = copying(tuned, folder / "copy")
    alpaca = [sys.executable, "-m", "alpaca"]
    path, out, back = folder / "m.gguf", folder / "m.diff", folder / "back"
    ways = {
        "gguf": [*alpaca, "export", str(tuned), "--to", "gguf", "-o", str(path)],
        "make": [*alpaca, "diff", "make", str(tuned), str(base), "-o", str(out)],
        "apply": [*alpaca, "diff", "apply", str(base), str(out), "-o", str(back)],
    }
    found: dict[str, object] = {"gigabytes": round(size / 1e9, 2), "copy_seconds": round(copy, 1)}
    peak, seconds = 0, {}
    for way, command in ways.items():
        memory = Memory()
        for one in (base, tuned):
            drop(one)
        seconds[way] = timed(lambda c=command, m=memory: m.watch(c), base / "config.json")  # type: ignore[misc]
        peak = max(peak, memory.peak)
        found |= {f"{way}_seconds": round(seconds[way], 1)}
        found |= {f"{way}_vs_copy": round(seconds[way] / copy, 2)}
        print(f"{way}: {seconds[way]:.1f} s, {memory.peak / 1e6:.0f} MB", file=sys.stderr)
        path.unlink(missing_ok=True)
    found |= {"peak_mb": round(peak / 1e6), "diff_share": round(out.stat().st_size / size, 3)}
    same = run_quiet(["diff", "-r", str(tuned), str(back)])
    assert same == 0, "the folder that came back differs"
    if old:
        shutil.rmtree(back)
        found |= way_of_2023(folder, base, tuned, seconds["apply"])
    return found


def way_of_2023(folder: Path, base: Path, tuned: Path, ours: float) -> dict[str, object]:
    """Seconds and peak memory of adding whole models in fp32."""
    diff = folder / "wdiff"
    shutil.copytree(tuned, diff)
    subtract(diff, base)
    for one in (base, diff):
        drop(one)
    memory = Memory()
    command = [sys.executable, "-c", WAY_OF_2023, *map(str, (base, diff, folder / "old"))]
    seconds = timed(lambda: memory.watch(command), base / "config.json")
    return {
        "way_of_2023_seconds": round(seconds, 1),
        "way_of_2023_peak_mb": round(memory.peak / 1e6),
        "way_of_2023_vs_apply": round(seconds / ours, 2),
    }


def make_models(base: Path, tuned: Path, layers: int, change: float) -> None:
    """Two folders of the same shape, written tensor by tensor, with a real tokenizer."""
    sys.path.insert(0, str(ROOT / "tests"))
    from transformers import AutoConfig
    from wheels import SENTENCEPIECE

    from alpaca import description, shards
    from alpaca.convert.sentencepieces import read_sentencepiece
    from alpaca.convert.source import llama_config

    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, DIM)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        for part in ("q", "k", "v", "o"):
            shapes[f"{prefix}self_attn.{part}_proj.weight"] = (DIM, DIM)
        shapes |= {f"{prefix}mlp.{part}_proj.weight": (WIDTH, DIM) for part in ("gate", "up")}
        shapes[f"{prefix}mlp.down_proj.weight"] = (DIM, WIDTH)
        shapes |= {
            f"{prefix}{part}_layernorm.weight": (DIM,) for part in ("input", "post_attention")
        }
    shapes |= {"model.norm.weight": (DIM,), "lm_head.weight": (VOCAB, DIM)}

    class Spec:
        def __init__(self, name: str, shape: tuple[int, ...]) -> None:
            self.name, self.shape = name, shape

    specs = [Spec(name, shape) for name, shape in shapes.items()]
    planned = shards.plan(specs, torch.bfloat16, SHARD)
    noise = torch.randn(VOCAB * DIM + 7919) * 0.02
    vocabulary = read_sentencepiece(SENTENCEPIECE.path())
    config = AutoConfig.for_model(
        **llama_config(
            vocab_size=VOCAB,
            hidden_size=DIM,
            intermediate_size=WIDTH,
            num_hidden_layers=layers,
            num_attention_heads=32,
            num_key_value_heads=32,
            max_position_embeddings=2048,
            rms_norm_eps=1e-6,
            rope_theta=10000.0,
            tie_word_embeddings=False,
        )
    )
    for folder, moved in ((base, 0.0), (tuned, change)):
        folder.mkdir()

        def value(spec: Spec, dtype: torch.dtype, moved: float = moved) -> torch.Tensor:
            count = torch.Size(spec.shape).numel()
            at = sum(map(ord, spec.name)) % 7919
            own = noise[at : at + count]
            if moved:
                own = own + noise[(at + 4001) % 7919 :][:count] * moved
            return own.reshape(spec.shape).to(dtype)

        for shard in planned:
            shards.write(shard, folder, value, lambda _: None)
        if len(planned) > 1:
            (folder / "model.safetensors.index.json").write_text(shards.index(planned))
        description.write(folder, config, vocabulary, torch.bfloat16)


def subtract(diff: Path, base: Path) -> None:
    """Make a folder's weights the difference in fp32, as published in 2023."""
    from safetensors.torch import load_file, save_file

    for path in diff.glob("*.safetensors"):
        theirs = load_file(base / path.name)
        ours = {
            name: value.float() - theirs[name].float() for name, value in load_file(path).items()
        }
        save_file(ours, path, metadata={"format": "pt"})


def copying(source: Path, target: Path) -> float:
    """Seconds of `cp`, with its bytes on the disk, and of reading the copy back."""
    drop(source)
    command = ["cp", "-r", str(source), str(target)]
    seconds = timed(lambda: run(command, ["sync", "-f", str(target)]), source / "config.json")
    for path in target.iterdir():
        seconds += timed(lambda p=path: read_through(p), path)  # type: ignore[misc]
    shutil.rmtree(target)
    return seconds


def drop(folder: Path) -> None:
    """Drop a folder's files from the page cache."""
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def run_quiet(command: list[str]) -> int:
    """The exit code of a command."""
    return subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode


if __name__ == "__main__":
    main()
