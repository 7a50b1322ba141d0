"""Tokenize once: the data set as flat arrays on disk, memory-mapped by every rank.

The cache's name is a hash of all that it depends on (data, tokenizer, templates, length), so it is
never stale. It is made before any process group exists, so no collective times out waiting for it.
"""

import fcntl
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from alpaca import atomic
from alpaca.errors import UserError
from alpaca.passport import sha256
from alpaca.prompt import template_hash

if TYPE_CHECKING:  # a plan reads these arrays without importing transformers
    from alpaca.tokens import Codec, Example

CHUNK = 2000
FORMAT = 2  # version of the arrays, and of the rules by which records are read


@dataclass(frozen=True)
class Corpus:
    """Examples as token ids; example i is `ids[offsets[i]:offsets[i+1]]`.

    ids: int32 (tokens,), offsets: int64 (examples + 1,), prompt_lengths: int32 (examples,),
    kinds: uint8 (examples,), 0 without and 1 with input; prefix_lengths: for each kind, how many
    leading tokens all its examples share; empty_outputs: examples whose answer is the EOS alone;
    notices: messages of `read_records` about the file.

    rejected_lengths: int32 (examples,) for preference pairs, else None. A pair is prompt, chosen
    and rejected answer: its last `rejected_lengths[i]` tokens follow the prompt, as the others do.
    """

    ids: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int64]
    prompt_lengths: npt.NDArray[np.int32]
    kinds: npt.NDArray[np.uint8]
    prefix_lengths: tuple[int, int]
    truncated: int
    empty_outputs: int = 0
    notices: tuple[str, ...] = ()
    rejected_lengths: npt.NDArray[np.int32] | None = None

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.kinds)

    def example(self, index: int) -> npt.NDArray[np.int32]:
        """Token ids of one example."""
        return self.ids[self.offsets[index] : self.offsets[index + 1]]

    def length(self, index: int) -> int:
        """Tokens of one example."""
        return int(self.offsets[index + 1] - self.offsets[index])

    def targets(self, index: int) -> int:
        """Tokens of one example that are trained on."""
        return self.length(index) - int(self.prompt_lengths[index])

    def answers(self, index: int) -> list[npt.NDArray[np.int32]]:
        """Token ids of an example's answer, or of a pair's chosen and rejected one."""
        after = self.example(index)[int(self.prompt_lengths[index]) :]
        if self.rejected_lengths is None:
            return [after]
        chosen = len(after) - int(self.rejected_lengths[index])
        return [after[:chosen], after[chosen:]]

    def alone(self, index: int) -> list[int]:
        """Tokens of each sequence of an example, by itself: a pair has two, with a prompt each."""
        if self.rejected_lengths is None:
            return [self.length(index)]
        rejected = int(self.rejected_lengths[index])
        return [self.length(index) - rejected, int(self.prompt_lengths[index]) + rejected]

    @property
    def without_targets(self) -> int:
        """Examples whose prompt alone fills the limit: nothing in them is trained on."""
        return int((np.diff(self.offsets) <= self.prompt_lengths).sum())


def split(corpus: Corpus, fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices of the examples to train on and of those held out; both leave out empty targets.

    Raises:
        UserError: `fraction` rounds to none or all of the examples.
    """
    usable = [i for i in range(len(corpus)) if corpus.targets(i) > 0]
    count = round(fraction * len(usable))
    if usable and fraction and count in (0, len(usable)):
        nothing = "nothing to evaluate on" if not count else "nothing to train on"
        raise UserError(
            f"--eval_fraction {fraction} of {len(usable):,} examples leaves {nothing}.",
            f"One example is a fraction of {1 / len(usable):.2g}; or use --eval_data_path.",
        )
    order = [int(i) for i in np.random.default_rng([seed]).permutation(usable)]
    return sorted(order[count:]), sorted(order[:count])


def no_targets_left(data: Path, max_length: int) -> UserError:
    """The refusal of a data set of which nothing is left to train or evaluate on."""
    return UserError(
        f"No example of {data} has an answer token left after truncation.",
        f"Raise --model_max_length (now {max_length}).",
    )


def open_corpus(
    data: Path,
    codec: "Codec",
    cache: Path,
    max_length: int,
    *,
    joint: bool = False,
    pairs: bool = False,
) -> Corpus:
    """Read, check and tokenize a data set, or open the arrays of an earlier run from `cache`.

    `pairs`: it holds preference pairs.

    Raises:
        UserError: as `read_records`, or as `read_pairs`.
    """
    folder = tokens_folder(data, codec, cache, max_length, joint=joint, pairs=pairs)
    if not folder.exists():
        with _lock(folder.with_suffix(".lock")):
            if not folder.exists():  # another rank may have made it while this one waited
                if pairs:
                    _build_pairs(folder, data, codec, max_length)
                else:
                    _build(folder, data, codec, max_length, joint)
    return load(folder)


def tokens_folder(
    data: Path,
    codec: "Codec",
    cache: Path,
    max_length: int,
    *,
    joint: bool = False,
    pairs: bool = False,
) -> Path:
    """Where in `cache` a data set's tokens are, or will be; raises UserError as `read_records`."""
    if not data.is_file():
        from alpaca.records import read_records

        read_records(data)  # explains what is wrong
    backend = codec.tokenizer.backend_tokenizer.to_str()
    parts = [
        FORMAT,
        sha256(data),
        backend,
        codec.bos,
        codec.eos,
        template_hash(),
        max_length,
        joint,
        *(["pairs"] if pairs else []),
    ]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]
    return cache / f"tokens-{key}"


def _build(folder: Path, data: Path, codec: "Codec", max_length: int, joint: bool) -> None:
    from alpaca.records import read_records  # imported here: packing reads no records

    notices: list[str] = []
    records = read_records(data, notices.append)
    examples = (
        example
        for start in _chunks(records)
        for example in codec.examples(records[start : start + CHUNK], max_length, joint=joint)
    )
    kinds = [bool(record.input) for record in records]
    empty = sum(not record.output for record in records)
    _write(folder, examples, kinds, {"empty_outputs": empty, "notices": notices}, pairs=False)


def _build_pairs(folder: Path, data: Path, codec: "Codec", max_length: int) -> None:
    from alpaca.pairs import read_pairs

    notices: list[str] = []
    pairs = read_pairs(data, notices.append)
    examples = (
        example
        for start in _chunks(pairs)
        for example in codec.pairs(pairs[start : start + CHUNK], max_length)
    )
    kinds = [bool(pair.input) for pair in pairs]
    empty = sum(not pair.chosen for pair in pairs)
    _write(folder, examples, kinds, {"empty_outputs": empty, "notices": notices}, pairs=True)


def _chunks(items: Sequence[object]) -> "tqdm[int]":
    """Where each chunk starts, with a progress bar."""
    return tqdm(range(0, len(items), CHUNK), desc="tokenize", unit="chunk", disable=None)


def _write(
    folder: Path,
    examples: "Iterable[Example]",
    kinds: list[bool],
    facts: dict[str, Any],
    *,
    pairs: bool,
) -> None:
    """Write the arrays of a corpus."""
    ids: list[npt.NDArray[np.int32]] = []
    lengths, prompts, rejected, truncated = [0], [], [], 0
    for example in examples:
        ids.append(np.asarray(example.ids, dtype=np.int32))
        lengths.append(len(example.ids))
        prompts.append(example.prompt_length)
        rejected.append(example.rejected_length)
        truncated += example.truncated
    arrays: dict[str, Any] = {
        "ids": np.concatenate(ids),
        "offsets": np.cumsum(lengths, dtype=np.int64),
        "prompt_lengths": np.asarray(prompts, dtype=np.int32),
        "kinds": np.asarray(kinds, dtype=np.uint8),
        **({"rejected_lengths": np.asarray(rejected, dtype=np.int32)} if pairs else {}),
    }
    shared = _shared(ids, prompts, arrays["kinds"])
    facts = {"prefix_lengths": shared, "truncated": truncated, **facts}
    with atomic.folder(folder) as partial:
        for name, array in arrays.items():
            np.save(partial / f"{name}.npy", array)
        (partial / "facts.json").write_text(json.dumps(facts))


def load(folder: Path) -> Corpus:
    """Open the arrays of a folder that `open_corpus` made."""

    def array(name: str) -> Any:
        return np.load(folder / f"{name}.npy", mmap_mode="r")

    facts = json.loads((folder / "facts.json").read_text())
    pairs = (folder / "rejected_lengths.npy").exists()
    return Corpus(
        ids=array("ids"),
        offsets=array("offsets"),
        prompt_lengths=array("prompt_lengths"),
        kinds=array("kinds"),
        prefix_lengths=tuple(facts["prefix_lengths"]),
        truncated=facts["truncated"],
        empty_outputs=facts["empty_outputs"],
        notices=tuple(facts["notices"]),
        rejected_lengths=array("rejected_lengths") if pairs else None,
    )


def _shared(
    ids: Sequence[npt.NDArray[np.int32]], prompts: Sequence[int], kinds: npt.NDArray[np.uint8]
) -> list[int]:
    """For each kind, how many leading tokens all its examples have in common (no targets)."""
    found = []
    for kind in (0, 1):
        members = [int(i) for i in np.flatnonzero(kinds == kind)]
        if len(members) < 2:
            found.append(0)
            continue
        first = ids[members[0]]
        common = min(prompts[i] for i in members)
        for i in members:
            differ = np.flatnonzero(ids[i][:common] != first[:common])
            common = int(differ[0]) if len(differ) else common
        found.append(common)
    return found


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold a file lock; the kernel drops it when the process dies, so none is ever stale."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
