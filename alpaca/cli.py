"""`python -m alpaca VERB`: one subcommand per verb.

Each verb is a module with `parser()` and `run(arguments)`, usually `command` in the verb's package.
Only the requested module is imported, so `--help` prints without delay.
"""

import argparse
import importlib
import sys

from alpaca import __version__
from alpaca.errors import exit_code

# verb: (module, one-line description)
VERBS = {
    "demo": ("alpaca.demo", "the whole pipeline on any machine: fetch, convert, train, serve, ask"),
    "fetch": (
        "alpaca.convert.download",
        "download the default model (SmolLM2-135M, 93 MB), or one of the Hugging Face Hub",
    ),
    "convert": (
        "alpaca.convert.command",
        "convert Meta, GGUF or old HF weights to clean HF folders",
    ),
    "doctor": (
        "alpaca.doctor.command",
        "check that this machine can train and serve, one line per check",
    ),
    "plan": ("alpaca.plan.command", "estimate memory, disk, time and cost of a training run"),
    "serve": ("alpaca.serving.command", "serve a model folder over Cog's HTTP API"),
    "answer": ("alpaca.evaluation.answering", "answer a suite of tasks, for score and compare"),
    "score": (
        "alpaca.evaluation.scoring",
        "score answers: checks, matches, loss, repetition, ends",
    ),
    "compare": (
        "alpaca.evaluation.comparing",
        "judge two models' answers blindly, on a local page",
    ),
    "judge": ("alpaca.evaluation.judging", "let a model judge two models' answers, in both orders"),
    "watch": ("alpaca.web.watch", "show a training run in the terminal while it trains"),
    "merge": (
        "alpaca.release.mergecommand",
        "write a LoRA adapter and its base as one model folder",
    ),
    "diff": ("alpaca.release.diffcommand", "publish a model as its difference from its base"),
    "export": (
        "alpaca.release.command",
        "write a model for llama.cpp, Ollama, as a tar file, in another type",
    ),
    "verify": ("alpaca.verify", "check a model folder against its passport: hashes, golden logits"),
    "audit": ("alpaca.dataset.audit", "report what is wrong with a data set, record by record"),
    "diversity": ("alpaca.dataset.diversity", "show what a data set asks for: a sunburst, figures"),
    "generate": ("alpaca.dataset.generate", "grow an instruction data set with a teacher model"),
}


def main(argv: list[str] | None = None) -> None:
    """Run one verb; exits 0, or 2 with an explanation when the user made a mistake."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in VERBS:
        verb = argv[0]
        module = importlib.import_module(VERBS[verb][0])
        parser: argparse.ArgumentParser = module.parser()
        parser.prog = f"python -m alpaca {verb}"
        arguments = parser.parse_args(argv[1:])
        sys.exit(exit_code(f"alpaca {verb}", lambda: module.run(arguments)))
    overview().parse_args(argv)
    overview().print_help()


def overview() -> argparse.ArgumentParser:
    """The parser of `python -m alpaca --help`, which lists the verbs."""
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb:<{width}}  {line}" for verb, (_, line) in VERBS.items())
    parser = argparse.ArgumentParser(
        prog="python -m alpaca",
        description="Convert, fine-tune and serve LLaMA-family models the Alpaca way.",
        epilog=f"verbs (each has --help):\n{verbs}\n\ntraining: torchrun train.py --help",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("verb", nargs="?", choices=list(VERBS), metavar="VERB", help="see below")
    parser.add_argument("--version", action="version", version=f"alpaca-cog {__version__}")
    return parser
