"""Find the model that the command line names, and recognize its format."""

import re
from pathlib import Path

from alpaca.convert.folders import check_links, inside
from alpaca.convert.gguf import open_gguf
from alpaca.convert.huggingface import open_folder
from alpaca.convert.meta import open_meta
from alpaca.convert.source import Source
from alpaca.errors import UserError
from alpaca.stored import check_adapter, check_pointer

SIZE = re.compile(r"\d+(\.\d+)?b([-_].*)?")
HUGGING_FACE = ("*.safetensors", "pytorch_model*.bin", "*.index.json")
WEIGHTS = ("*.gguf", "*.pth", *HUGGING_FACE)


def find(input_dir: Path, model_size: str | None) -> Path:
    """The model folder that `--input_dir` and `--model_size` name.

    Raises:
        UserError: there is no model, or there are several and `model_size` is not given.
    """
    if not input_dir.is_dir():
        raise UserError(
            f"There is no folder {input_dir}.", "Set --input_dir to the folder with your weights."
        )
    if model_size is not None:
        if "/" in model_size or model_size in ("", ".", ".."):
            raise UserError(
                f"--model_size {model_size!r} is not a folder name.",
                f"It must be the name of a folder below {input_dir}, for example 7B.",
            )
        if not (input_dir / model_size).is_dir():
            raise UserError(f"There is no folder {input_dir / model_size}.", _listing(input_dir))
        return input_dir / model_size
    if holds_model(input_dir):
        return input_dir
    found = models_below(input_dir)
    if len(found) != 1:
        what = f"are {len(found)} models" if found else "is no model"
        raise UserError(f"There {what} in {input_dir}.", _listing(input_dir))
    return found[0]


def holds_model(folder: Path) -> bool:
    """Whether a folder itself contains weight files."""
    return any(True for kind in WEIGHTS for _ in folder.glob(kind))


def models_below(input_dir: Path) -> list[Path]:
    """Subfolders of `input_dir` that contain weight files, one level down."""
    return [
        path
        for path in sorted(input_dir.iterdir())
        if path.is_dir() and not path.name.startswith(".") and holds_model(path)
    ]


def _listing(input_dir: Path) -> str:
    found = [path.name for path in models_below(input_dir)]
    if found:
        given = "" if input_dir == Path("unconverted-weights") else f" --input_dir {input_dir}"
        return (
            f"Choose one with --model_size: {', '.join(found)}. For example:\n    "
            f"./convert_weights.sh{given} --model_size {found[0]}"
        )
    return (
        "Put a model there (unconverted-weights/README.md shows how), "
        "or fetch a small one: python -m alpaca fetch"
    )


def output_name(folder: Path) -> str:
    """Name of the folder to write: `7B` becomes llama-7b, any other name becomes lower case.

    A model stored directly in unconverted-weights/ is named after its GGUF file, or else "model".
    """
    name = folder.resolve().name.lower()
    if name == "unconverted-weights":
        ggufs = sorted(folder.glob("*.gguf"))
        name = ggufs[0].stem.lower() if ggufs else "model"
    return f"llama-{name}" if SIZE.fullmatch(name) else name


def open_source(input_dir: Path, folder: Path, *, instruct: bool | None = None) -> Source:
    """Recognize the format of a model folder and describe it as a source.

    Raises:
        UserError: it is damaged, incomplete, of an unknown format, or links out of `input_dir`.
    """
    check_links(input_dir, folder)
    name = output_name(folder)
    check_adapter(folder)
    ggufs = sorted(folder.glob("*.gguf"))
    for path in [*ggufs, *folder.glob("*.pth"), *folder.glob("tokenizer.*")]:
        check_pointer(path)
    if ggufs:
        return open_gguf(ggufs, name)
    if any(folder.glob("*.pth")):
        return open_meta(folder, _tokenizer_model(input_dir, folder), name, instruct=instruct)
    if any(True for kind in HUGGING_FACE for _ in folder.glob(kind)):
        return open_folder(folder, name)
    raise UserError(
        f"{folder} holds no weights: no *.pth, *.gguf, *.safetensors or pytorch_model*.bin.",
        "unconverted-weights/README.md shows the layout of a model folder.",
    )


def _tokenizer_model(input_dir: Path, folder: Path) -> Path:
    """LLaMA 1 and 2 keep one tokenizer next to the model folders, Llama 3 has one in each."""
    own = folder / "tokenizer.model"
    if not own.is_file() and folder != input_dir:
        own = inside(input_dir, own.name)
    if own.is_file():
        check_pointer(own)
    return own
