"""Adapters beside one base in the engine: peft's answers for each, and the base's own bits."""

import gc
import json
import shutil
import struct
import tarfile
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import FAMILIES, make_adapter, make_base, peft_model, record
from engines import Replaying
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from alpaca.adapter import Adapter
from alpaca.errors import UserError
from alpaca.folder import load_tokenizer
from alpaca.model import load_model
from alpaca.serving import loading, weights
from alpaca.serving.attention import PrefillChunk
from alpaca.serving.engine import Engine
from alpaca.serving.forward import Batch
from alpaca.serving.lora import LoadedAdapter, layers_of
from alpaca.serving.request import Job, Request, Sampling
from alpaca.serving.weights import Weights
from alpaca.tokens import Codec

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 8},
    "rslora": {"r": 5, "use_rslora": True, "target_modules": ["q_proj", "up_proj"]},
    "dora": {"r": 4, "lora_alpha": 8, "use_dora": True},
    "patterns": {
        "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.down_proj": 7},
        "alpha_pattern": {"q_proj": 5, "1.mlp.up_proj": 30},
    },
}  # fmt: skip
NAMES = ("base", *SETTINGS)
TUNED = {"ALPACA_SLOTS": "8", "ALPACA_CONTEXT": "300", "ALPACA_DTYPE": "float32"}
PROMPTS = ["Name three colors.", "", "บอกฉัน", "many words " * 30, "def f(x):"]
GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module", params=[*FAMILIES, "16 bits"])
def folders(
    request: pytest.FixtureRequest,
    bpe: PreTrainedTokenizerBase,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Path]:
    """A base and adapters of it; in 16 bits the engine packs its weights differently."""
    root = tmp_path_factory.mktemp("adapters")
    family, kind = request.param, torch.float32
    if family == "16 bits":
        family, kind = "qwen2", torch.bfloat16
    found = {"base": make_base(root / "base", bpe, family, kind)}
    for seed, (name, settings) in enumerate(SETTINGS.items()):
        found[name] = make_adapter(root / name, found["base"], seed=seed, **settings)
    return found


@contextmanager
def serving(folders: dict[str, Path]) -> Iterator[tuple[Engine, Codec]]:
    """An engine with all adapters but the base."""
    adapters = {name: folder for name, folder in folders.items() if name != "base"}
    found = Weights(folders["base"], "a test", adapters)
    engine, codec = loading.load(found, TUNED)
    yield engine, codec
    engine.stop()


@pytest.fixture(scope="module")
def served(folders: dict[str, Path]) -> Iterator[tuple[Engine, Codec]]:
    with serving(folders) as both:
        yield both


def reference(folders: dict[str, Path], name: str) -> Any:
    """The model as transformers, or peft, loads and computes it."""
    if name == "base":
        return AutoModelForCausalLM.from_pretrained(folders["base"], dtype=torch.float32)
    return peft_model(folders["base"], folders[name], torch.float32)


def submitted(engine: Engine, prompt: list[int], name: str, **settings: Any) -> Job:
    asked = {"max_new_tokens": 12, "sampling": GREEDY, "logprobs": 3, "ignore_ends": True}
    adapter = "" if name == "base" else name
    return engine.submit(Request(tuple(prompt), adapter=adapter, **{**asked, **settings}))


def test_each_adapter_answers_as_peft_does_in_one_batch_with_the_base(
    folders: dict[str, Path], served: tuple[Engine, Codec]
) -> None:
    engine, codec = served
    models = {name: reference(folders, name) for name in NAMES}
    prompts = [codec.prompt(text, given) for text in PROMPTS for given in ("", "x")]
    asked = [(prompt, name) for prompt in prompts for name in NAMES]
    jobs = [submitted(engine, *one) for one in asked]
    answers = set()
    for (prompt, name), job in zip(asked, jobs, strict=True):
        job.completions[0].result.result(60)
        scored = job.completions[0].scored
        ids = [one.token for one in scored]
        with torch.no_grad():
            logits = models[name](torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        logprobs = logits.double().log_softmax(-1)
        for place, one in enumerate(scored):
            best = logprobs[place].max()
            assert logprobs[place, one.token] > best - 1e-4, (name, place)
            assert abs(one.logprob - logprobs[place, one.token]) < 1e-4, (name, place)
            wanted = logprobs[place].topk(3).values
            assert torch.allclose(torch.tensor([p for _, p in one.top]).double(), wanted, atol=1e-4)
        answers.add((tuple(prompt), tuple(ids)))
    assert len(answers) > 0.7 * len(asked)  # the adapters do change what is answered


def pass_of(owners: list[str], engine: Engine) -> torch.Tensor:
    """Logits of one pass: six decoding rows and two prompt chunks, each of an owner."""
    model = engine.model
    found = [engine.adapters.find(name) for name in owners]
    for slot in range(8):
        ids = [7 + slot + at for at in range(12)]
        adapted = {found[slot]: range(12)} if found[slot] is not None else {}
        model.run(Batch([], [(PrefillChunk(slot, 0, 12), ids)], [0], adapted))
    adapted = {}
    for row, adapter in enumerate(found):
        if adapter is not None:
            rows = [row] if row < 6 else range(6 + 4 * (row - 6), 10 + 4 * (row - 6))
            adapted[adapter] = [*adapted.get(adapter, []), *rows]
    decoding = [(slot, 12, 3) for slot in range(6)]
    chunks = [(PrefillChunk(slot, 12, 16), [5, 6, 7, 8]) for slot in (6, 7)]
    return model.run(Batch(decoding, chunks, [*range(6), 9, 13], adapted)).clone()


def test_the_bases_rows_keep_their_bits_whatever_their_neighbours_ask(
    folders: dict[str, Path], served: tuple[Engine, Codec], bpe: PreTrainedTokenizerBase
) -> None:
    engine, _ = served
    bare, _ = loading.load(Weights(folders["base"], "a test"), TUNED)
    plain = pass_of([""] * 8, bare)
    bare.stop()
    assert torch.equal(pass_of([""] * 8, engine), plain)
    mixed = ["", "plain", "", "dora", "plain", "", "", "rslora"]
    found = pass_of(mixed, engine)
    for row, owner in enumerate(mixed):
        assert torch.equal(found[row], plain[row]) is (owner == ""), row
    assert torch.equal(pass_of([""] * 8, engine), plain)  # the layers are as before


def test_n_answers_share_an_adapter(served: tuple[Engine, Codec]) -> None:
    engine, codec = served
    prompt = codec.prompt("Name three colors.")
    one = submitted(engine, prompt, "dora").completions[0].result.result(60)
    many = submitted(engine, prompt, "dora", n=3)
    assert {part.result.result(60).text for part in many.completions} == {one.text}
    plain = submitted(engine, prompt, "base").completions[0].result.result(60)
    assert plain.text != one.text


@pytest.fixture(scope="module")
def llama(
    bpe: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """One base, two adapters of it and one of another base."""
    root = tmp_path_factory.mktemp("llama")
    base, other = make_base(root / "base", bpe), make_base(root / "other", bpe, "llama, biases")
    return {
        "base": base,
        "one": make_adapter(root / "one", base, seed=3, recorded=True),
        "two": make_adapter(root / "two", base, seed=4, use_dora=True),
        "foreign": make_adapter(root / "foreign", other, recorded=True),
    }


@pytest.fixture
def engine(llama: dict[str, Path]) -> Iterator[tuple[Engine, Codec]]:
    with serving({"base": llama["base"]}) as both:
        yield both


def greedy(llama: dict[str, Path], name: str, prompt: list[int], count: int) -> list[int]:
    """Tokens that peft's model, or the base, chooses."""
    model, ids = reference(llama, name), list(prompt)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def tokens(job: Job) -> list[int]:
    job.completions[0].result.result(60)
    return [one.token for one in job.completions[0].scored]


def begun(job: Job) -> Job:
    """A job that has its first token, so that it runs."""
    next(iter(job.completions[0]))
    return job


def test_adapters_come_change_and_go_while_requests_run(
    llama: dict[str, Path], engine: tuple[Engine, Codec]
) -> None:
    served, codec = engine
    prompt = codec.prompt("Name three colors.")
    wanted = {name: greedy(llama, name, prompt, 100) for name in ("base", "one", "two")}
    assert len({tuple(ids) for ids in wanted.values()}) == 3
    running = [begun(submitted(served, prompt, "base", max_new_tokens=100))]
    served.load_adapter("mine", llama["one"], codec)
    running.append(begun(submitted(served, prompt, "mine", max_new_tokens=100)))
    served.load_adapter("mine", llama["two"], codec)
    running.append(begun(submitted(served, prompt, "mine", max_new_tokens=100)))
    assert served.adapters.loaded[0].requests == 2  # of the name, which is what /metrics shows
    freed = weakref.ref(served.adapters.loaded[0])
    served.adapters.remove("mine")
    with pytest.raises(UserError, match=r"no adapter 'mine' here; served: base"):
        submitted(served, prompt, "mine")
    assert not all(job.completions[0].result.done() for job in running)  # or nothing was tested
    assert [tokens(job) for job in running] == [wanted[name] for name in ("base", "one", "two")]
    assert freed() is not None
    del running
    gc.collect()
    assert freed() is None
    assert tokens(submitted(served, prompt, "base", max_new_tokens=100)) == wanted["base"]


def test_the_output_layer_can_be_changed(
    llama: dict[str, Path], engine: tuple[Engine, Codec], tmp_path: Path
) -> None:
    """It computes only the rows that are sampled from: none of the first chunk of a long prompt."""
    served, codec = engine
    folder = make_adapter(tmp_path / "head", llama["base"], target_modules=["lm_head", "v_proj"])
    path = folder / "adapter_model.safetensors"
    held = load_file(path)  # peft adds a copy of the embedding
    save_file({name: part for name, part in held.items() if "lora_" in name}, path)
    served.load_adapter("head", folder, codec)
    prompts = [codec.prompt(text) for text in (*PROMPTS, "long " * 180)]
    asked = [(prompt, name) for prompt in prompts for name in ("head", "base")]
    jobs = [submitted(served, *one) for one in asked]
    folders = {"base": llama["base"], "head": folder}
    for (prompt, name), job in zip(asked, jobs, strict=True):
        assert tokens(job) == greedy(folders, name, prompt, 12), name


def test_many_requests_while_adapters_change_get_their_own_answers(
    llama: dict[str, Path], engine: tuple[Engine, Codec]
) -> None:
    served, codec = engine
    prompts = [codec.prompt(text) for text in PROMPTS]
    wanted = {
        (name, number): greedy(llama, name, prompt, 12)
        for name in ("base", "one", "two")
        for number, prompt in enumerate(prompts)
    }
    served.load_adapter("two", llama["two"], codec)
    stop = threading.Event()

    def change() -> None:
        while not stop.is_set():
            served.load_adapter("one", llama["one"], codec)
            served.adapters.remove("one")

    changing = threading.Thread(target=change)
    changing.start()
    asked, refused = [], 0
    for turn in range(60):
        name, number = ("base", "one", "two")[turn % 3], turn % len(prompts)
        try:
            asked.append((name, number, submitted(served, prompts[number], name)))
        except UserError:
            refused += name == "one"
    found = [(name, number, tokens(job)) for name, number, job in asked]
    stop.set()
    changing.join()
    assert len(asked) + refused == 60
    for name, number, ids in found:
        assert ids == wanted[name, number], (name, number)


def test_the_base_is_checked_and_what_cannot_be_checked_is_said(
    llama: dict[str, Path],
    engine: tuple[Engine, Codec],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    served, codec = engine

    def load(folder: Path, name: str = "x") -> None:
        served.load_adapter(name, folder, codec)

    with pytest.raises(UserError, match="was trained on other weights"):
        load(llama["foreign"])
    load(llama["one"], "one")
    assert "hashes" not in capsys.readouterr().out
    load(llama["two"], "two")
    assert capsys.readouterr().out.count("it records no hashes of its base") == 1
    quantized = tmp_path / "quantized"
    shutil.copytree(llama["one"], quantized)
    record(quantized, llama["base"], quantized="nf4")
    load(quantized)
    assert "trained over a base in nf4" in capsys.readouterr().out
    altered = tmp_path / "altered"
    shutil.copytree(llama["one"], altered)
    with (altered / "adapter_config.json").open("a") as file:
        file.write(" ")
    with pytest.raises(UserError, match="changed after it was written"):
        load(altered)
    with pytest.raises(UserError, match="is the name of the base"):
        load(llama["one"], "base")
    with pytest.raises(UserError, match="cannot be an adapter's name"):
        load(llama["one"], "a\nb")
    with pytest.raises(UserError, match="holds no adapter"):
        load(llama["base"])
    assert served.adapters.names == ["base", "one", "two", "x"]


def test_a_tokenizer_of_other_tokens_is_refused_and_another_chat_template_is_used(
    llama: dict[str, Path], engine: tuple[Engine, Codec], tmp_path: Path
) -> None:
    served, codec = engine
    folder = tmp_path / "adapter"
    shutil.copytree(llama["two"], folder)
    tokenizer = load_tokenizer(llama["base"])
    tokenizer.chat_template = "{{ messages[0].content }}!"
    tokenizer.save_pretrained(folder)
    served.load_adapter("chatty", folder, codec)
    [loaded] = served.adapters.loaded
    assert loaded.codec is not None
    message = [{"role": "user", "content": "Hi"}]
    assert loaded.codec.chat(message) == codec.prompts(["Hi!"])[0] != codec.chat(message)
    tokenizer.add_tokens(["<one more>"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(UserError, match="a tokenizer with other tokens"):
        served.load_adapter("chatty", folder, codec)


def test_an_adapter_that_does_not_fit_into_memory_is_refused_unread(
    llama: dict[str, Path], engine: tuple[Engine, Codec], tmp_path: Path
) -> None:
    """Its file has a header for a terabyte of numbers, and a hole where they would be."""
    served, codec = engine
    folder = tmp_path / "huge"
    shutil.copytree(llama["two"], folder)
    rank, hidden = 1 << 31, 64
    size = 4 * rank * hidden
    layer = "base_model.model.model.layers.0.self_attn.q_proj"
    header = json.dumps({
        f"{layer}.lora_A.weight": {
            "dtype": "F32", "shape": [rank, hidden], "data_offsets": [0, size]},
        f"{layer}.lora_B.weight": {
            "dtype": "F32", "shape": [hidden, rank], "data_offsets": [size, 2 * size]},
    }).encode()  # fmt: skip
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(
        json.dumps(settings | {"use_dora": False, "r": rank})
    )
    with (folder / "adapter_model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + 2 * size)
    with pytest.raises(UserError, match=r"needs 1,048,576 MiB of cpu memory; .* are left"):
        served.load_adapter("huge", folder, codec)
    assert served.adapters.names == ["base"]


def test_a_gpus_recorded_steps_are_the_bases_alone(
    llama: dict[str, Path], engine: tuple[Engine, Codec]
) -> None:
    """A pass with an adapter is computed, not replayed, and changes no recording."""
    served, codec = engine
    served.load_adapter("one", llama["one"], codec)
    [one] = served.adapters.loaded
    replaying = Replaying(load_model(llama["base"], torch.float32))
    replaying.allocate(replaying.probe(), served.capacity)
    own = LoadedAdapter("one", layers_of(Adapter(llama["one"]), replaying.model))
    decoding = [(0, 0, 7), (1, 0, 8), (2, 0, 9)]
    for rows, replays in (([], 1), ([1], 1), ([], 2)):
        mine, its = ({adapter: rows} if rows else {} for adapter in (one, own))
        computed = served.model.run(Batch(decoding, [], [0, 1, 2], mine))
        found = replaying.run(Batch(decoding, [], [0, 1, 2], its))
        torch.testing.assert_close(found, computed)
        assert replaying.replays == replays


@pytest.mark.parametrize("name", ["plain", "dora"])
def test_a_model_spread_by_accelerate_is_changed_too(
    tiny_model: Path, tmp_path: Path, name: str
) -> None:
    """The weights of its second layer are on the disk, and come when it computes."""
    folder = make_adapter(tmp_path / "adapter", tiny_model, **SETTINGS[name])
    codec = Codec(load_tokenizer(tiny_model))
    spread = AutoModelForCausalLM.from_pretrained(
        tiny_model,
        dtype=torch.float32,
        device_map="auto",
        max_memory={"cpu": 750_000},
        offload_folder=tmp_path / "offloaded",
        use_safetensors=True,
    )
    assert set(spread.hf_device_map.values()) == {"cpu", "disk"}
    found = Weights(tiny_model, "a test", {"tuned": folder})
    served = loading.make_engine(spread, codec, {"ALPACA_CONTEXT": "200"}, weights=found)
    prompt = codec.prompt("Say hello.")
    wanted = {"base": tiny_model, "tuned": folder}
    for one in ("tuned", "base", "tuned"):
        assert tokens(submitted(served, prompt, one)) == greedy(wanted, one, prompt, 12), one
    served.stop()


# ---- which folder is the base, and which adapter answers by default


def test_an_adapters_folder_as_weights_answers_by_default(
    llama: dict[str, Path], tmp_path: Path
) -> None:
    found = weights.locate(llama["one"], {}, tmp_path)  # its settings name the base's folder
    assert found.folder == llama["base"]
    engine, codec = loading.load(found, TUNED)
    prompt = codec.prompt("Name three colors.")
    for name, wanted in (("", "one"), ("one", "one"), ("base", "base")):
        job = engine.submit(Request(
            tuple(prompt), max_new_tokens=12, sampling=GREEDY, logprobs=0, ignore_ends=True,
            adapter=name,
        ))  # fmt: skip
        assert tokens(job) == greedy(llama, wanted, prompt, 12), name
    assert engine.adapters.names == ["one", "base"]
    with pytest.raises(UserError, match="answers requests that name no adapter"):
        engine.adapters.remove("one")
    engine.stop()


def placed(source: Path, folder: Path, base: str) -> Path:
    """A copy of an adapter whose settings name this base."""
    shutil.copytree(source, folder)
    path = folder / "adapter_config.json"
    settings = json.loads(path.read_text()) | {"base_model_name_or_path": base}
    path.write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("place", ["beside", "root/models/here", "root/weights/llama-7b"])
def test_the_base_is_found_where_the_settings_may_mean(
    llama: dict[str, Path], tmp_path: Path, place: str
) -> None:
    base = tmp_path / place
    shutil.copytree(llama["base"], base)
    named = {"beside": "beside", "root/models/here": "models/here"}.get(place, "/gone/llama-7b")
    folder = placed(llama["two"], tmp_path / "mine", named)
    found = weights.locate(folder, {}, tmp_path / "root")
    assert found.folder == base
    assert found.adapters == {"mine": folder}
    assert found.default == "mine"


def test_a_base_that_is_not_found_is_said_and_can_be_named(
    llama: dict[str, Path], tmp_path: Path
) -> None:
    folder = placed(llama["two"], tmp_path / "mine", "meta-llama/Llama-2-7b")
    with pytest.raises(UserError, match=r"(?s)was not found \(.*Llama-2-7b\).*ALPACA_BASE"):
        weights.locate(folder, {}, tmp_path)
    found = weights.locate(folder, {"ALPACA_BASE": str(llama["base"])}, tmp_path)
    assert found.folder == llama["base"]
    with tarfile.open(tmp_path / "adapter.tar", "w") as archive:
        archive.add(folder, "mine")
    packed = weights.locate(tmp_path / "adapter.tar", {"ALPACA_BASE": str(llama["base"])}, tmp_path)
    assert packed.default == "mine"
    assert packed.folder == llama["base"]


@pytest.mark.parametrize(
    ("listed", "said"),
    [
        ("one", "Write it as NAME=FOLDER"),
        ("one=", "Write it as NAME=FOLDER"),
        ("x={one},x={two}", "Two adapters are named x"),
        ("x={base}", "is not an adapter's folder"),
        ("x=nowhere", "do not exist"),
    ],
)
def test_a_wrong_list_of_adapters_is_said(
    llama: dict[str, Path], tmp_path: Path, listed: str, said: str
) -> None:
    environment = {"ALPACA_ADAPTERS": listed.format(**llama)}
    with pytest.raises(UserError, match=said):
        weights.locate(llama["base"], environment, tmp_path)


def test_several_adapters_are_named_at_start(llama: dict[str, Path], tmp_path: Path) -> None:
    environment = {"ALPACA_ADAPTERS": "a={one}, b={two}".format(**llama)}
    found = weights.locate(llama["base"], environment, tmp_path)
    assert found.adapters == {"a": llama["one"], "b": llama["two"]}
    assert found.default == ""
