"""Whole checkpoints to be damaged, and the judge: what lies there afterwards is right or absent."""

import hashlib
import shutil
from pathlib import Path

import reference
import torch
from reference import LLAMA_1, LLAMA_3, convert
from safetensors.torch import load_file

NAME = "llama-7b"


def make_good(root: Path) -> Path:
    """Whole checkpoints, with checklists, and what they convert to."""
    for name, shape, shards in (("one", LLAMA_1, 1), ("four", LLAMA_1, 4), ("three", LLAMA_3, 2)):
        held = reference.weights(shape, torch.float16)
        add_checklist(reference.save(root / name / "7B", shape, held, shards))
        code, said = convert("--input_dir", root / name, "--output_dir", root / f"{name}-out")
        assert code == 0, said
    return root


def add_checklist(folder: Path) -> None:
    """checklist.chk as `md5sum` writes it."""
    lines = [
        f"{hashlib.md5(path.read_bytes()).hexdigest()}  {path.name}\n"
        for path in sorted(folder.iterdir())
    ]
    (folder / "checklist.chk").write_text("".join(lines))


class Bench:
    """A copy of a whole checkpoint, to be damaged, and the right answer."""

    def __init__(self, good: Path, name: str, root: Path, *, checklist: bool) -> None:
        self.right = good / f"{name}-out" / NAME
        self.input, self.output = root / "in", root / "out"
        self.folder = self.input / "7B"
        shutil.copytree(good / name, self.input)
        if not checklist:
            (self.folder / "checklist.chk").unlink()

    def run(self, *options: object) -> tuple[int, str]:
        """Convert; whatever the exit code, what lies there afterwards must be right or absent."""
        code, said = convert("--input_dir", self.input, "--output_dir", self.output, *options)
        final = self.output / NAME
        assert code in (0, 2), said
        assert "Traceback" not in said
        assert final.exists() == (code == 0), said
        if code == 0:
            assert same(final, self.right), said
        return code, said


def same(one: Path, other: Path) -> bool:
    """Equal weights and equal files around them."""
    files = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    mine, theirs = (load_file(folder / "model.safetensors") for folder in (one, other))
    return (
        set(mine) == set(theirs)
        and all(torch.equal(mine[name], theirs[name]) for name in mine)
        and all((one / file).read_bytes() == (other / file).read_bytes() for file in files)
    )
