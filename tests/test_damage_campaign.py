"""Flipped bytes and cuts of what this program writes: found, or harmless. See docs/reliability.md.

Checkpoints and archives have their own (tests/test_checkpoint.py, tests/test_serving_archives.py).
"""

import copy
import json
import random
import struct
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from alpaca import passport, stored, verify
from alpaca.cli import main
from alpaca.dataset.journal import Journal
from alpaca.errors import UserError

FLIPS, CUTS = 50, 20


def damaged(content: bytes, index: int) -> bytes:
    """One byte inverted, or everything from a place on cut off."""
    place = random.Random(index).randrange(len(content))
    if index >= FLIPS:
        return content[:place]
    return content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :]


def test_a_damaged_passport_is_found(tiny_model: Path, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (tmp_path / name).write_bytes((tiny_model / name).read_bytes())
    passport.write(tmp_path, "train")
    whole = (tmp_path / passport.NAME).read_bytes()
    for index in range(FLIPS + CUTS):
        (tmp_path / passport.NAME).write_bytes(damaged(whole, index))
        with pytest.raises(SystemExit) as ended:
            main(["verify", str(tmp_path)])
        assert ended.value.code == 2, index
    (tmp_path / passport.NAME).write_bytes(whole)
    recorded = passport.read(tmp_path)
    assert recorded is not None
    assert verify.sealed(tmp_path, recorded) == []


def test_a_damaged_journal_is_refused_and_a_cut_one_loses_its_last_lines_only(
    tmp_path: Path,
) -> None:
    path, settings = tmp_path / "journal.jsonl", {"model": "a", "seed": 1}
    with Journal(path, settings) as journal:
        for number in range(40):
            journal.append({"entry": "reply", "number": number, "text": "é" * number})
    whole = path.read_bytes()
    with Journal(path, settings) as journal:
        entries = journal.entries
    assert [entry["number"] for entry in entries] == list(range(40))
    for index in range(FLIPS + CUTS):
        path.write_bytes(damaged(whole, index))
        try:
            with Journal(path, settings) as journal:
                found = journal.entries
        except UserError:
            continue
        # A flip of the last line's end looks like a kill within a write: that line is written anew.
        assert found == entries[: len(found)], index
        assert index >= FLIPS or len(found) >= len(entries) - 1, index


ODD = [0, -1, 1, 2**31, 2**53, 2**63, 2**64, 1e308, "1", None, [], {}, [1], True]


def mutated(table: dict[str, object], choose: random.Random) -> bytes:
    """A safetensors header with odd values, names and lengths."""
    table = copy.deepcopy(table)

    def odd() -> object:
        return copy.deepcopy(choose.choice(ODD))

    for _ in range(choose.choice([1, 1, 2, 3])):
        name = choose.choice(list(table) or ["a"])
        entry = table.setdefault(name, {})
        how = choose.randrange(6)
        if not isinstance(entry, dict) or how == 0:
            table[name] = odd()
        elif how == 1:
            entry["shape"] = choose.choice([[odd(), odd()], [odd()], odd()])
        elif how == 2:
            entry["data_offsets"] = [odd(), odd()]
        elif how == 3:
            entry["dtype"] = choose.choice(["F32", "F64", "BF16", "X", odd()])
        elif how == 4:
            table[choose.choice(["", "\0", "../x", "a" * 1000])] = table.pop(name)
        else:
            entry.pop(choose.choice(list(entry) or [""]), None)
    text = json.dumps(table).encode()
    if choose.random() < 0.3:
        at = choose.randrange(len(text))
        text = text[:at] + choose.randbytes(choose.randrange(4)) + text[at + choose.randrange(4) :]
    length = choose.choice([len(text)] * 6 + [0, 2**31, 2**63, len(text) - 1])
    return struct.pack("<Q", length) + text


def outcomes(folder: Path, number: int) -> Counter[str]:
    tensors = {"a": torch.ones(4, 8), "b": torch.ones(3), "c": torch.ones(2, 2).bfloat16()}
    path = folder / "model.safetensors"
    save_file(tensors, path)
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    table, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    found: Counter[str] = Counter()
    for index in range(number):
        path.write_bytes(mutated(table, random.Random(index)) + data)
        began = time.monotonic()
        try:
            stored.check_types(stored.header(path))
        except UserError:
            found["refused"] += 1
            continue
        finally:
            assert time.monotonic() - began < 5, index
        found["read"] += 1
        load_file(path)  # what is read here, safetensors can read too
    return found


def test_odd_safetensors_headers_are_refused_or_harmless(tmp_path: Path) -> None:
    assert outcomes(tmp_path, 500)["refused"] > 300


@pytest.mark.slow
def test_ten_thousand_odd_safetensors_headers(tmp_path: Path) -> None:
    before = psutil.Process().memory_info().rss
    assert outcomes(tmp_path, 10_000)["refused"] > 6_000
    assert psutil.Process().memory_info().rss < before + 500e6
