"""What the scripts of bench/engines.py share: the task, the tokenizer's part of it, the report."""

import json
import socket
import sys
import urllib.request
from typing import Any


def task() -> tuple[str, dict[str, Any]]:
    """The folder, and what to do with it: texts, prompts, and the most new tokens."""
    with open(sys.argv[2], encoding="utf-8") as file:
        return sys.argv[1], json.load(file)


def templates(tokenizer: Any, prompts: list[str]) -> list[list[int]]:
    """Ids of each prompt as the chat template writes it; the template brings the BOS token."""
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
    return [list(tokenizer(text, add_special_tokens=False).input_ids) for text in texts]


def stops(folder: str) -> list[int]:
    """The ids that end an answer, from generation_config.json."""
    with open(f"{folder}/generation_config.json", encoding="utf-8") as file:
        found = json.load(file)["eos_token_id"]
    return found if isinstance(found, list) else [found]


def without(ids: list[int], ends: list[int]) -> list[int]:
    """The ids before the first that ends an answer."""
    return next((ids[:at] for at, one in enumerate(ids) if one in ends), ids)


def free_port() -> int:
    """A free TCP port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def ask(port: int, path: str, body: object = None) -> dict[str, Any]:
    """The JSON that a server answers: to GET, or to POST with a body."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}",
        None if body is None else json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
        return json.load(answer)  # type: ignore[no-any-return]


def report(**found: Any) -> None:
    """One line of JSON, the last of the output."""
    print(json.dumps(found))
