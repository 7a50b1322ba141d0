"""Our win rates on AlpacaEval 2's published annotations, next to the published ones.

    .venv/bin/python bench/alpaca_eval.py --results DIR [--leaderboard CSV]

DIR is `results/` of the repository tatsu-lab/alpaca_eval, CSV its
`weighted_alpaca_eval_gpt4_turbo_leaderboard.csv`. The two other inputs of the reference, the
difficulties of the instructions and the gamed rows, are recovered (see the constants). The last
line is JSON: model to win_rate, standard_error and length_controlled_winrate, in percent.
"""

import argparse
import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from alpaca.errors import UserError
from alpaca.evaluation.annotations import Annotation, by_generator, read
from alpaca.evaluation.length_control import Comparison, length_controlled
from alpaca.evaluation.statistics import win_rate

JUDGE = "weighted_alpaca_eval_gpt4_turbo"
BASELINE = "gpt4_1106_preview"
GAMED = (f"{BASELINE}_verbose", f"{BASELINE}_concise")
KEYS = ("win_rate", "standard_error", "length_controlled_winrate")
TOLERANCES = (0.01, 0.01, 0.1)

# The files of these models in the doubled folder hold glm_preference, which is
# logistic(constant + weight * difficulty of the instruction). Weight and constant are published
# (weights/.../length_controlled_v1/baseline_gpt4_1106_preview.csv). The difficulties that follow
# from the two files agree to 5e-8.
DIFFICULTY_FROM = {
    "vicuna-13b-v1.5": (1.1135907865888532, -3.0486680858737603),
    "vicuna-7b-v1.5": (1.0968125007177112, -3.5163474642647694),
}
# Weights of length and difficulty that predict the gamed rows' preferences where their annotations
# are absent. A logistic fit depends on the preferences p only through the sums of x * p. At the
# published weights t of a model, gradient(model) + 0.1 * gradient(gamed rows) = -sign(t) / C, which
# gives the sums over the gamed rows: length -182.69 (standard deviation over 54 models 0.08),
# difficulty 412.92 (0.15). The two numbers are the weights whose predictions have these sums.
# Lengths standardized for each gamed model on its own explain the published weights; lengths
# standardized jointly do not (standard deviation 9).
GAMED_WEIGHTS = (-1.83650, 0.74434)


@dataclass(frozen=True)
class Reference:
    """What the reference fits a model with, besides its annotations."""

    difficulty: dict[str, float]  # by instruction, in the order of the standard file
    gamed: Sequence[Comparison]
    told: str  # where they come from


def annotation_files(results: Path) -> dict[str, Path]:
    """The annotation file of each model folder; one in the doubled folder only if it is alone."""
    found = {}
    for folder in sorted(path for path in results.iterdir() if path.is_dir()):
        plain = folder / JUDGE / "annotations.json"
        doubled = folder / JUDGE / JUDGE / "annotations.json"
        path = plain if plain.exists() else doubled
        if path.exists():
            found[folder.name] = path
    if not found:
        raise UserError(f"{results} holds no MODEL/{JUDGE}/annotations.json.", "Give its results/.")
    return found


def reference(results: Path) -> Reference:
    """Difficulties and gamed rows, recovered from the files in `results` as far as they go."""
    difficulty = _difficulty(results)
    if not difficulty:
        return Reference({}, (), "no difficulties found: length_controlled_minimal, not comparable")
    gamed = [one for name in GAMED if (one := _gamed(results, name, difficulty))]
    if len(gamed) != len(GAMED):
        return Reference(difficulty, (), "no gamed rows found: length_controlled_noreg")
    return Reference(difficulty, gamed, "length_controlled_v1, with recovered inputs")


def _difficulty(results: Path) -> dict[str, float]:
    for model, (weight, constant) in DIFFICULTY_FROM.items():
        path = results / model / JUDGE / JUDGE / "annotations.json"
        if path.exists():
            rows = read(path)
            predicted = np.array([one.extra["glm_preference"] for one in rows])
            values = (np.log(predicted) - np.log1p(-predicted) - constant) / weight
            return dict(zip((one.instruction for one in rows), values.tolist(), strict=True))
    return {}


def _gamed(results: Path, model: str, difficulty: dict[str, float]) -> Comparison | None:
    """The rows of one gamed model: its annotations if they are there, else predictions."""
    path = results / model / JUDGE / "annotations.json"
    if path.exists():
        return comparison(read(path), list(difficulty.values()))
    files = [results / name / "model_outputs.json" for name in (BASELINE, model)]
    if not all(file.exists() for file in files):
        return None
    outputs = [{row["instruction"]: row["output"] for row in _json(file)} for file in files]
    lengths = np.array([[len(texts[key]) for texts in outputs] for key in difficulty])
    difference = lengths[:, 0] - lengths[:, 1]
    columns = np.tanh(difference / difference.std(ddof=1)), np.array(list(difficulty.values()))
    odds = GAMED_WEIGHTS[0] * columns[0] + GAMED_WEIGHTS[1] * columns[1]
    predicted = 1 + 1 / (1 + np.exp(-odds))
    first, second = lengths.T.tolist()
    return Comparison(predicted.tolist(), first, second, columns[1].tolist())


def _json(path: Path) -> list[dict[str, str]]:
    found: list[dict[str, str]] = json.loads(path.read_text(encoding="utf-8"))
    return found


def comparison(rows: Sequence[Annotation], difficulty: Sequence[float] | None) -> Comparison:
    """The columns of the rows; difficulty is cut to their number, see `by_position`."""
    return Comparison(
        [one.preference for one in rows],
        [len(one.output_1) for one in rows],
        [len(one.output_2) for one in rows],
        None if difficulty is None else difficulty[: len(rows)],
    )


def length_control(rows: Sequence[Annotation], known: Reference, by_position: bool) -> float:
    """The length-controlled win rate in percent; 50 for the baseline itself, by definition.

    The reference looks the difficulty up by position. In a file that lacks some of the 805 rows,
    the rows after the first gap then get the difficulty of another instruction. The published
    numbers are so; `by_position=False` looks it up by instruction instead.
    """
    [pair] = by_generator(rows)
    if pair[0] == pair[1]:
        return 50.0
    difficulty = None
    if known.difficulty:
        found = [known.difficulty[one.instruction] for one in rows]
        difficulty = list(known.difficulty.values()) if by_position else found
    own = comparison(rows, difficulty)
    fit = length_controlled(
        own.preferences, own.lengths_1, own.lengths_2, own.difficulty, known.gamed
    )
    assert fit.win_rate is not None, fit.note
    return fit.win_rate


def evaluate(results: Path) -> tuple[dict[str, dict[str, float]], dict[str, float], str]:
    """The three numbers of each model; those of incomplete files by instruction; the inputs."""
    known = reference(results)
    found, by_instruction = {}, {}
    for model, path in tqdm(annotation_files(results).items(), unit="model"):
        rows = read(path)
        raw = win_rate([one.preference for one in rows])
        controlled = length_control(rows, known, by_position=True)
        found[model] = dict(
            zip(KEYS, (raw.rate, raw.standard_error or 0.0, controlled), strict=True)
        )
        if known.difficulty and [one.instruction for one in rows] != list(known.difficulty):
            by_instruction[model] = length_control(rows, known, by_position=False)
    return found, by_instruction, known.told


def published(leaderboard: Path) -> dict[str, dict[str, float]]:
    """The same three numbers of each model on the leaderboard, where it has them."""
    with leaderboard.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if all(row[key] for key in KEYS)]
    return {row[""]: {key: float(row[key]) for key in KEYS} for row in rows}


def report(found: dict[str, dict[str, float]], theirs: dict[str, dict[str, float]]) -> None:
    """Print ours and, in brackets, ours minus the published; then how many are close."""
    print(f"{'model':38}" + "".join(f"{key:>28}" for key in KEYS))
    for model, ours in found.items():
        cells = [
            f"{ours[key]:15.4f} "
            + (f"({ours[key] - theirs[model][key]:+.5f})" if model in theirs else " " * 11)
            for key in KEYS
        ]
        print(f"{model:38}" + "".join(f"{cell:>28}" for cell in cells))
    both = [model for model in found if model in theirs]
    if not both:
        return
    for key, tolerance in zip(KEYS, TOLERANCES, strict=True):
        gaps = {model: abs(found[model][key] - theirs[model][key]) for model in both}
        close = sum(gap <= tolerance for gap in gaps.values())
        worst = sorted(gaps, key=lambda model: -gaps[model])[:3]
        listed = ", ".join(f"{model} {gaps[model]:.4f}" for model in worst)
        print(f"{key}: {close} of {len(both)} within {tolerance}; largest: {listed}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--leaderboard", type=Path)
    arguments = parser.parse_args()
    found, by_instruction, told = evaluate(arguments.results)
    report(found, published(arguments.leaderboard) if arguments.leaderboard else {})
    print(f"length control: {told}")
    for model, rate in by_instruction.items():
        print(f"{model}: {rate:.4f} length-controlled, with the difficulty of its own instructions")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
