"""lm-eval's scores over /v1/completions beside those of transformers, on a local task of each kind.

    python bench/lm_eval_doors.py [--model FOLDER] [--limit 40]

Writes two tasks from the seed tasks: which of four answers belongs to an instruction (log
likelihoods), and a greedy answer of at most 24 tokens, compared with the reference (generation).
lm-eval runs each with `--model hf` and with `--model local-completions` against our server, both in
fp32, in .venvs/lm-eval. The last line is JSON: each task's scores by both, and if they are equal.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

from engines import ENGINES, environment
from serve import ROOT, ours

CHOICE = """
task: alpaca_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{gold}}}}"
target_delimiter: ""
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
ANSWER = """
task: alpaca_answer
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
generation_kwargs: {{until: ["\\n\\n"], max_gen_toks: 24, do_sample: false}}
metric_list: [{{metric: bleu}}, {{metric: chrf}}]
"""


def main() -> None:
    """Write the tasks, run lm-eval twice, compare."""
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument("--model", type=Path, default=ROOT / "weights" / "smollm2-135m")
    options.add_argument("--limit", type=int, default=40, help="documents of each task")
    given = options.parse_args()
    (engine,) = (one for one in ENGINES if one.name == "lm-eval")
    python = environment(engine)
    with tempfile.TemporaryDirectory(prefix="bench-lm-eval-") as name:
        folder = Path(name)
        write_tasks(folder, given.limit)
        model = given.model.resolve()
        hf = scores(python, folder, "hf", f"pretrained={model},dtype=float32")
        with ours(model) as (_, web):
            settings = f"model={model.name},base_url={web}/v1/completions,tokenizer={model}"
            settings += ",num_concurrent=8,max_retries=1,tokenized_requests=True"
            served = scores(python, folder, "local-completions", settings)
    report = {
        task: {"hf": hf[task], "served": served[task], "equal": hf[task] == served[task]}
        for task in hf
    }
    print(json.dumps(report))


def write_tasks(folder: Path, limit: int) -> None:
    """The two tasks and their documents."""
    sys.path.insert(0, str(ROOT))
    from alpaca.prompt import render

    tasks = [json.loads(line) for line in (ROOT / "data/seed_tasks.jsonl").read_text().splitlines()]
    short = [task for task in tasks if not task["input"] and len(task["output"]) < 300][:limit]
    chance = random.Random(0)
    with (folder / "data.jsonl").open("w") as file:
        for task in short:
            others = chance.sample([one["output"] for one in short if one is not task], 3)
            gold = chance.randrange(4)
            choices = [*others[:gold], task["output"], *others[gold:]]
            line = {
                "prompt": render(task["instruction"]),
                "choices": choices,
                "gold": gold,
                "answer": task["output"],
            }
            file.write(json.dumps(line) + "\n")
    data = folder / "data.jsonl"
    (folder / "choice.yaml").write_text(CHOICE.format(data=data))
    (folder / "answer.yaml").write_text(ANSWER.format(data=data))


def scores(python: Path, folder: Path, kind: str, arguments: str) -> dict[str, dict[str, float]]:
    """lm-eval's numbers for both tasks."""
    out = folder / f"out-{kind}"
    command = [
        python, "-m", "lm_eval", "--model", kind, "--model_args", arguments,
        "--tasks", "alpaca_choice,alpaca_answer", "--include_path", folder,
        "--batch_size", "1" if kind == "hf" else "4", "--output_path", out,
    ]  # fmt: skip
    subprocess.run([str(word) for word in command], check=True, stdout=sys.stderr)
    (result,) = out.rglob("results_*.json")
    found = json.loads(result.read_text())["results"]
    return {
        task: {name: value for name, value in values.items() if isinstance(value, float)}
        for task, values in found.items()
    }


if __name__ == "__main__":
    main()
