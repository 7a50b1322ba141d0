"""Download a model of the Hugging Face Hub, ready to convert: `python -m alpaca fetch OWNER/NAME`.

Only files that a conversion reads are fetched: weights, in safetensors if the repository has them,
settings and tokenizer, licence texts. The token of a gated model is read from HF_TOKEN. A folder is
complete or absent; what an interrupted download has written is kept and completed.
"""

import re
from pathlib import Path

from alpaca import atomic
from alpaca.errors import UserError

NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
TEXTS = ["*.json", "*.model", "*.jinja", "LICEN[CS]E*", "NOTICE*", "USE_POLICY*", "README.md"]
WEIGHTS = (".safetensors", ".bin")  # the first kind that there is


def is_name(text: str) -> bool:
    """Whether a text can be a model's name on the Hub: OWNER/NAME."""
    return NAME.fullmatch(text) is not None


def fetch(name: str, input_dir: Path, revision: str | None = None) -> Path:
    """Download a model below `input_dir` if it is missing; returns its folder.

    Raises:
        UserError: there is no such model, it may not be read, or the Hub cannot be reached.
    """
    final = input_dir / name.rpartition("/")[2]
    atomic.recover(final)
    if final.exists():
        return final
    # Imported here, because it takes a second, which --help should not.
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
    from huggingface_hub.errors import HTTPError as AnyHTTPError  # type: ignore[attr-defined]

    try:
        files = HfApi().list_repo_files(name, revision=revision)
        kind = next((end for end in WEIGHTS if any(file.endswith(end) for file in files)), None)
        if kind is None:
            raise UserError(f"{name} holds no weights ({' or '.join(WEIGHTS)}).")
        with atomic.folder(final, keep_partial=True) as partial:
            snapshot_download(
                name, revision=revision, local_dir=partial, allow_patterns=[*TEXTS, f"*{kind}"]
            )
            atomic.remove(partial / ".cache")
    except GatedRepoError:
        raise UserError(
            f"{name} is gated: its owner decides who may read it.",
            "Accept its terms on its page, and set HF_TOKEN to a token of your account.",
        ) from None
    except RepositoryNotFoundError:
        raise UserError(
            f"The Hub shows no model {name}.",
            "Check the name; for a private one, set HF_TOKEN to a token that may read it.",
        ) from None
    except (AnyHTTPError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's, not the network's
        raise UserError(
            f"{name} could not be downloaded: {error}", "Run it again: what is complete is kept."
        ) from None
    return final
