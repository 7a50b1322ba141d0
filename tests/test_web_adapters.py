"""Adapters over HTTP: named in requests to both ports, loaded and unloaded where it is allowed."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from adapters import make_adapter, make_base, peft_model
from http_server import Server, free_port
from prometheus_client.parser import text_string_to_metric_families
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from alpaca.serving import loading
from alpaca.serving.engine import Engine
from alpaca.serving.weights import Weights
from alpaca.tokens import Codec
from alpaca.web import app, server

PROMPT = "Name three colors."
COUNT = 10
TUNED = {"ALPACA_SLOTS": "5", "ALPACA_CONTEXT": "300", "ALPACA_DTYPE": "float32"}


@pytest.fixture(scope="module")
def folders(
    bpe: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """A base, a folder of adapters that may be loaded, and one outside of it."""
    root = tmp_path_factory.mktemp("web")
    base = make_base(root / "base", bpe)
    allowed = root / "allowed"
    return {
        "root": root,
        "base": base,
        "allowed": allowed,
        "first": make_adapter(allowed / "first", base, seed=3, recorded=True),
        "second": make_adapter(allowed / "second", base, seed=4, use_dora=True),
        "outside": make_adapter(root / "outside", base, seed=5),
    }


@pytest.fixture(scope="module")
def wanted(folders: dict[str, Path], bpe: PreTrainedTokenizerBase) -> dict[str, str]:
    """The text that transformers and peft generate, greedily."""
    codec, found = Codec(bpe), {}
    ids = codec.prompt(PROMPT)
    for name in ("base", "first", "second"):
        model: Any = (
            AutoModelForCausalLM.from_pretrained(folders["base"], dtype=torch.float32)
            if name == "base"
            else peft_model(folders["base"], folders[name], torch.float32)
        )
        made = model.generate(
            input_ids=torch.tensor([ids]), do_sample=False, max_new_tokens=COUNT, pad_token_id=0
        )
        found[name] = codec.decode(made[0, len(ids) :].tolist())
    assert len(set(found.values())) == 3
    return found


@contextmanager
def listening(engine: Engine, codec: Codec, allowed: Path | None) -> Iterator[httpx.Client]:
    web = server.Web(app.Site(adapters=allowed), "127.0.0.1", 0)
    web.serve("base", engine, codec)
    with httpx.Client(base_url=web.url, timeout=60) as http:
        yield http
    web.stop()


@pytest.fixture
def loaded(folders: dict[str, Path]) -> Iterator[tuple[Engine, Codec]]:
    engine, codec = loading.load(Weights(folders["base"], "a test"), TUNED)
    yield engine, codec
    engine.stop()


@pytest.fixture
def http(loaded: tuple[Engine, Codec], folders: dict[str, Path]) -> Iterator[httpx.Client]:
    with listening(*loaded, folders["allowed"]) as client:
        yield client


def load(http: httpx.Client, name: str, path: str) -> httpx.Response:
    return http.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": path})


def unload(http: httpx.Client, name: str) -> httpx.Response:
    return http.post("/v1/unload_lora_adapter", json={"lora_name": name})


def models(http: httpx.Client) -> list[str]:
    return [one["id"] for one in http.get("/v1/models").json()["data"]]


def answer(http: httpx.Client, model: str | None) -> str:
    message = [{"role": "user", "content": PROMPT}]
    body = {"model": model, "messages": message, "max_tokens": COUNT, "temperature": 0}
    return str(
        http.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]
    )


def test_an_adapter_is_loaded_named_replaced_and_unloaded(
    http: httpx.Client, folders: dict[str, Path], wanted: dict[str, str]
) -> None:
    assert models(http) == ["base"]
    assert load(http, "mine", "first").status_code == 200
    assert models(http) == ["base", "mine"]
    assert http.get("/v1/models/mine").json()["parent"] == "base"
    assert "parent" not in http.get("/v1/models/base").json()
    for model, name in ((None, "base"), ("base", "base"), ("mine", "first")):
        assert answer(http, model) == wanted[name], model
    assert load(http, "mine", str(folders["second"])).status_code == 200  # absolute, and inside
    assert answer(http, "mine") == wanted["second"]
    body = {"model": "mine", "prompt": PROMPT, "max_tokens": 2}
    assert http.post("/v1/completions", json=body).json()["model"] == "mine"
    assert [one["id"] for one in http.get("/page/settings").json()["models"]] == ["base", "mine"]
    read = text_string_to_metric_families(http.get("/metrics").text)
    samples = {(s.name, s.labels.get("adapter")): s.value for f in read for s in f.samples}
    assert samples["alpaca_adapter_requests_total", "mine"] == 3
    assert samples["alpaca_adapters", None] == 1
    assert samples["alpaca_adapter_bytes", None] > 0
    assert unload(http, "mine").status_code == 200
    assert models(http) == ["base"]
    refused = http.post("/v1/completions", json=body)
    assert (refused.status_code, refused.json()["error"]["code"]) == (404, "model_not_found")
    assert "mine" not in http.get("/metrics").text
    assert unload(http, "mine").status_code == 404


def test_without_a_folder_for_adapters_none_can_be_loaded(loaded: tuple[Engine, Codec]) -> None:
    with listening(*loaded, None) as http:
        for answered in (load(http, "x", "first"), unload(http, "x")):
            assert answered.status_code == 403
            assert "ALPACA_ADAPTER_FOLDER" in answered.json()["error"]["message"]


def test_nothing_outside_the_folder_is_read(http: httpx.Client, folders: dict[str, Path]) -> None:
    allowed = folders["allowed"]
    (allowed / "link").symlink_to(folders["outside"])
    shutil.copytree(folders["first"], allowed / "linked")
    (allowed / "linked" / "adapter_model.safetensors").unlink()
    (allowed / "linked" / "adapter_model.safetensors").symlink_to(
        folders["outside"] / "adapter_model.safetensors"
    )
    (allowed / "circle").symlink_to("circle")
    for path in ("../outside", str(folders["outside"]), "link", "linked", ".", "..", "/etc", "",
                 "first/../../outside", "/nowhere"):  # fmt: skip
        answered = load(http, "x", path)
        assert answered.status_code == 403, path
        assert "not in the folder for adapters" in answered.json()["error"]["message"]
    for path in ("a\0b", "x" * 5000, "circle", "nowhere"):
        assert load(http, "x", path).status_code == 400, path
    assert models(http) == ["base"]


def test_what_is_wrong_is_answered_with_400(http: httpx.Client, folders: dict[str, Path]) -> None:
    wrong = (
        ({"lora_name": "x"}, "lora_path"),
        ({"lora_name": "x", "lora_path": "first", "more": 1}, "more"),
        ({"lora_name": "base", "lora_path": "first"}, "is a model's name"),
        ({"lora_name": " ", "lora_path": "first"}, "cannot be an adapter's name"),
    )
    for body, said in wrong:
        answered = http.post("/v1/load_lora_adapter", json=body)
        assert answered.status_code == 400
        assert said in answered.json()["error"]["message"]


def test_both_ports_of_the_real_server_take_adapters(
    folders: dict[str, Path], wanted: dict[str, str], tmp_path: Path
) -> None:
    """The weights are an adapter's folder: it answers by default, and its base by its own name."""
    port = free_port()
    running = Server(
        folders["first"], tmp_path / "log", "--adapter", f"other={folders['second']}",
        "--adapter-folder", str(folders["allowed"]), "--web-port", str(port), **TUNED,
    )  # fmt: skip
    try:
        running.wait_until_ready()
        said = running.log.read_text()
        assert f"serving {folders['base']} with adapter first by default" in said
        asked = {"prompt": PROMPT, "temperature": 0, "max_new_tokens": COUNT}
        for adapter, name in (
            ("", "first"),
            ("first", "first"),
            ("base", "base"),
            ("other", "second"),
        ):
            assert running.post(**asked, adapter=adapter).json()["output"] == [wanted[name]], (
                adapter
            )
        failed = running.post(**asked, adapter="none").json()
        assert failed["status"] == "failed"
        assert "There is no adapter 'none' here; served: first, base, other." in failed["error"]
        with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none") as client:
            assert [one.id for one in client.models.list()] == ["first", "base", "other"]
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
            for model, name in ((None, "first"), ("base", "base"), ("other", "second")):
                assert answer(http, model) == wanted[name], model
            assert load(http, "later", "second").status_code == 200
            assert running.post(**asked, adapter="later").json()["output"] == [wanted["second"]]
    finally:
        running.stop()
