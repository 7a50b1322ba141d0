"""What a plan computes, against what others have published and what the trainer itself does."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers

from alpaca import shards, stored
from alpaca.errors import UserError
from alpaca.plan import devices, disk, duration, plan, shapes
from alpaca.plan import memory as plan_memory
from alpaca.plan.memory import Setting
from alpaca.plan.plan import Machine
from alpaca.plan.remedies import enough_nodes, remedies
from alpaca.plan.workload import LargestPack, Workload
from alpaca.recipe.arguments import Arguments

# From the model cards and papers: the number of elements in the published weight files.
PUBLISHED = {
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama-30b": 32_528_943_616,
    "llama-65b": 65_285_660_672,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "smollm2-135m": 134_515_008,
}
LLAMA_3 = shapes.KNOWN["llama-3.1-8b"]
GIB = 2**30


def work(tokens: int, targets: int) -> Workload:
    load = LargestPack(tokens, tokens, targets)
    return Workload(
        examples=256,
        steps=1,
        batch=256,
        tokens=tokens,
        real=tokens,
        padded=2 * tokens,
        targets=targets,
        attended=tokens * 100,
        packs=1,
        largest=load,
        exact=True,
    )


def test_parameters_of_every_known_model_are_those_published() -> None:
    assert {name: shape.parameters for name, shape in shapes.KNOWN.items()} == PUBLISHED


def test_seven_billion_parameters_need_112_gb_at_16_bytes_each() -> None:
    assert plan_memory.state_bytes(7_000_000_000) == 112_000_000_000


@pytest.mark.parametrize(("ranks", "published"), [(8, 82.4), (128, 67.0)])
def test_torchtitans_memory_with_selective_checkpointing(ranks: int, published: float) -> None:
    """torchtitan, benchmarks/llama3_h100_202412_torchtitan.md, tables 1 and 3.

    Llama 3.1 8B, FSDP2, bf16 with fp32 weights, 2 sequences of 8,192 a GPU, whole logits; of a
    layer it keeps the input, the attention's output and every second matrix product's.
    """
    tokens = 2 * 8192
    setting = Setting(ranks, compute=2, checkpointing=True, chunk=tokens, logit=12)
    found = plan_memory.peak(LLAMA_3, LargestPack(tokens, tokens, tokens), setting, runtime=0)
    kept = 2 * (LLAMA_3.heads * 128 * 2 + LLAMA_3.kv_heads * 128 + LLAMA_3.intermediate + 4096)
    selective = (kept + 4 * LLAMA_3.heads) * tokens * LLAMA_3.layers
    assert found.moment == "loss"
    total = found.total + selective * (1 + plan_memory.ALLOCATOR)
    assert total / GIB == pytest.approx(published, rel=0.15)


def test_torchtitans_memory_with_full_checkpointing_of_one_long_sequence() -> None:
    """The same document, table 2: 8 H100, one sequence of 32,768 a GPU, 83.9 GiB.

    A whole cross-entropy takes 12 bytes a logit: its log-softmax, and two gradients, in fp32.
    """
    setting = Setting(8, compute=2, checkpointing=True, chunk=32768, logit=12)
    found = plan_memory.peak(LLAMA_3, LargestPack(32768, 32768, 32768), setting, runtime=0)
    assert found.total / GIB == pytest.approx(83.9, rel=0.15)


def test_the_published_run_fits_on_cards_where_it_ran_out_of_memory_in_2023() -> None:
    arguments = Arguments(bf16=True)
    full = LargestPack(2048, 2600, 1600, repeated=True)
    for card, fits in (("a100-40", True), ("a100-80", True), ("rtx-4090", False)):
        machine = Machine(devices.named(card), ranks=8)
        counted = dataclasses.replace(work(2048, 1600), largest=full)
        made = plan.make(shapes.KNOWN["llama-7b"], arguments, machine, counted)
        assert made.fits == fits, (card, made.memory)


def test_remedies_fit_and_the_cheapest_comes_first() -> None:
    shape, machine = shapes.KNOWN["llama-7b"], Machine(devices.named("rtx-4090"), ranks=8)
    arguments = Arguments(bf16=True)

    def count(other: Arguments) -> Workload:
        packs = arguments.pack_tokens // other.pack_tokens
        tokens = other.pack_tokens
        return dataclasses.replace(
            work(8 * arguments.pack_tokens, 8 * 1600),
            packs=packs,
            largest=LargestPack(tokens, tokens, tokens * 3 // 4),
        )

    assert not plan.make(shape, arguments, machine, count(arguments)).fits
    found = remedies(shape, arguments, machine, count)
    assert found
    assert all(remedy.plan.fits for remedy in found)
    adapting = [remedy.adapts for remedy in found]
    assert adapting == sorted(adapting)  # what trains all weights comes first
    assert any(adapting)
    for kind in (False, True):
        spent = [one.plan.seconds or math.inf for one in found if one.adapts == kind]
        assert spent == sorted(spent)
    assert "--gradient_checkpointing True" in {remedy.flags for remedy in found}
    for remedy in found:
        again = dataclasses.replace(arguments, **remedy.changed)
        assert plan.make(shape, again, machine, count(again)).memory == remedy.plan.memory


def test_a_run_that_nothing_makes_fit_has_no_remedy() -> None:
    shape, machine = shapes.KNOWN["llama-3.1-405b"], Machine(devices.named("t4"), host=64 * 10**9)
    counted = work(512, 400)
    assert not plan.make(shape, Arguments(), machine, counted).fits
    assert remedies(shape, Arguments(), machine, lambda _: counted) == []


@pytest.mark.parametrize("name", ["tokens", "keys", "targets"])
def test_more_of_anything_needs_more_memory(name: str) -> None:
    load = LargestPack(2000, 2500, 800)
    more = dataclasses.replace(load, **{name: 2 * getattr(load, name)})
    setting = Setting(8, compute=2)
    shape = shapes.KNOWN["llama-7b"]
    totals = [plan_memory.peak(shape, each, setting).total for each in (load, more)]
    assert totals[0] < totals[1]


@pytest.mark.parametrize(
    "saving", [{"shards": 16}, {"checkpointing": True}, {"offload": True}, {"optimizer": 2.0}]
)
def test_each_saving_saves(saving: dict[str, object]) -> None:
    load, setting = LargestPack(2000, 2500, 1500), Setting(8, compute=2)
    shape = shapes.KNOWN["llama-7b"]
    less = dataclasses.replace(setting, **saving)  # type: ignore[arg-type]
    assert plan_memory.peak(shape, load, less).total < plan_memory.peak(shape, load, setting).total


def test_time_counts_what_is_computed_twice() -> None:
    """6 operations for each parameter and token; 8 with checkpointing; the vocabulary apart."""
    shape, counted = shapes.KNOWN["llama-7b"], work(2048, 0)
    plain, again = (duration.flops(shape, counted, repeated) for repeated in (False, True))
    layers = shape.parameters - shape.root_parameters
    assert plain == pytest.approx(6 * layers * 2048, rel=0.01)
    assert again / plain == pytest.approx(8 / 6)


class Tensor(NamedTuple):
    name: str
    shape: tuple[int, ...]


@pytest.mark.parametrize("name", shapes.KNOWN)
def test_the_exports_size_is_that_of_the_files_the_exporter_lays_out(name: str) -> None:
    tensors = [Tensor(*item) for item in shapes.KNOWN[name].tensors().items()]
    laid_out = shards.plan(tensors, torch.bfloat16)
    index = shards.index(laid_out) if len(laid_out) > 1 else ""
    assert disk.export_bytes(shapes.KNOWN[name]) == sum(s.size for s in laid_out) + len(index)


@pytest.mark.parametrize("kind", ["LlamaConfig", "MistralConfig", "Qwen2Config", "Qwen3Config"])
def test_tensors_are_those_of_the_model_in_its_order(kind: str) -> None:
    config = getattr(transformers, kind)(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=48,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    ordered = [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]
    shape = shapes.from_config(config.to_dict(), Path("config.json"))
    assert list(shape.tensors().items()) == ordered


def test_three_nodes_are_faster_than_one_and_copies_cost_traffic() -> None:
    """A node's data leaves it through the network of all its cards, not of one."""
    shape, counted = shapes.KNOWN["llama-7b"], work(8 * 2048 * 600, 8 * 1600 * 600)
    arguments = Arguments(bf16=True)
    cards = devices.named("a100-80")
    packs = dataclasses.replace(counted, steps=600, packs=600)
    one = plan.make(shape, arguments, Machine(cards, 8), packs)
    three = plan.make(
        shape, arguments, Machine(cards, 8, nodes=3), dataclasses.replace(packs, packs=200)
    )
    assert one.time is not None
    assert three.time is not None
    assert one.time.seconds / 3.2 < three.time.seconds < one.time.seconds / 2
    setting = plan.setting(shape, arguments, Machine(cards, 8))
    copied = dataclasses.replace(setting, shards=1)
    assert duration.traffic(shape, packs, copied, 300e9, 8, 1) > 0
    across = dataclasses.replace(setting, shards=8)
    within = duration.traffic(shape, packs, across, 300e9, 8, 1)
    assert duration.traffic(shape, packs, across, 300e9, 24, 3) > within


@pytest.mark.parametrize(
    ("flags", "checkpoints", "exports"),
    [
        ({"save_strategy": "no"}, 0, 1),
        ({"save_steps": 2000}, 2, 0),  # the one at the end, and one that a signal asked for
        ({"save_steps": 10, "save_total_limit": 3}, 4, 0),
        ({"save_steps": 60, "save_total_limit": 9}, 3, 1),
        ({"save_steps": 100, "save_only_model": True}, 1, 1),  # the signal's
        ({"save_steps": 10, "save_best": True, "eval_strategy": "steps", "eval_steps": 20}, 3, 0),
        ({"save_strategy": "no", "save_best": True, "eval_strategy": "steps"}, 1, 1),
    ],
)
def test_disk_is_counted_for_the_worst_moment(
    flags: dict[str, Any], checkpoints: int, exports: int
) -> None:
    counted = dataclasses.replace(work(2048, 1600), steps=100)
    needed = disk.disk_bytes(Arguments(**flags), counted, 1000, 10)
    assert needed == checkpoints * 1000 + exports * 10


@pytest.mark.parametrize(
    ("flags", "host", "saves", "saving"),
    [
        ({"save_strategy": "no"}, None, 0, 0),
        # two beside the training, copied from 8 devices at 16 GB/s, and the last of 80.9 GB
        ({"save_steps": 4000}, None, 3, 2 * 80.9 / 8 / 16 + 80.9),
        ({"save_steps": 4000}, 100 * 10**9, 3, 3 * 80.9),  # no room for a copy
        ({"save_steps": 4000, "optim": "adamw_8bit"}, None, 3, 3 * 6.738 * (4 + 2 + 8 / 256)),
        ({"save_steps": 4000, "save_only_model": True}, None, 2, 2 * 3 * 13.48),
        # after steps 3000, 4000, 6000, 8000, 9000, and the last
        (
            {"save_steps": 4000, "optim": "adamw_8bit", "save_best": True}
            | {"eval_strategy": "steps", "eval_steps": 3000},
            None,
            6,
            6 * 6.738 * (4 + 2 + 8 / 256),
        ),
    ],
)
def test_the_time_of_saving_is_that_in_which_training_waits(
    flags: dict[str, Any], host: int | None, saves: int, saving: float
) -> None:
    counted = dataclasses.replace(work(2048, 1600), steps=10_000, tokens=10**9)
    machine = Machine(devices.named("a100-80"), 8, host=host)
    made = plan.make(shapes.KNOWN["llama-7b"], Arguments(bf16=True, **flags), machine, counted)
    assert made.saves == saves
    assert made.files.saving == pytest.approx(saving, rel=1e-3, abs=1e-9)
    assert made.files.loading == pytest.approx(13.48, rel=1e-3)
    assert made.files.total == pytest.approx(saving + 5 * 13.48, rel=1e-3)
    assert made.seconds is not None
    hours = made.cost(2.0)
    assert hours == pytest.approx((made.seconds + made.files.total) / 3600 * 8 * 2)


def test_saves_that_take_longer_than_the_steps_between_them_wait_for_each_other() -> None:
    shape = shapes.KNOWN["llama-7b"]
    counted = dataclasses.replace(work(2048, 1600), steps=100, tokens=10**6)
    machine = Machine(devices.named("a100-80"), 8)
    made = plan.make(shape, Arguments(bf16=True, save_steps=10), machine, counted)
    assert made.seconds is not None
    apart = made.seconds / 10
    assert apart < 80.9
    assert made.files.saving == pytest.approx(9 * (80.9 - apart + 80.9 / 128) + 80.9, rel=1e-3)


def test_fewer_checkpoints_are_a_remedy_for_a_small_disk() -> None:
    shape = shapes.KNOWN["llama-7b"]
    counted = dataclasses.replace(work(2048, 1600), steps=10_000)
    machine = Machine(devices.named("a100-80"), 8, disk=200 * 10**9)
    arguments = Arguments(bf16=True, save_total_limit=5)
    first = remedies(shape, arguments, machine, lambda _: counted)[0]
    assert first.flags == "--save_total_limit 1"
    tiny = dataclasses.replace(machine, disk=10**9)
    assert enough_nodes(shape, arguments, tiny, lambda _: counted) is None


def test_a_folder_whose_weights_are_not_those_of_its_config_is_refused(
    tiny_model: Path, tmp_path: Path
) -> None:
    assert shapes.find(tiny_model).parameters == sum(
        entry.elements for entry in stored.tensors(tiny_model).values()
    )
    config = json.loads((tiny_model / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    (tmp_path / "model.safetensors").write_bytes((tiny_model / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match=r"lacks 9 tensor\(s\) \(first: model\.layers\.2"):
        shapes.find(tmp_path)


def test_names_of_tensors_are_those_in_the_folder(tiny_model: Path) -> None:
    shape = shapes.find(tiny_model)
    sizes = {name: math.prod(dimensions) for name, dimensions in shape.tensors().items()}
    held = stored.tensors(tiny_model)
    assert sizes == {name: entry.elements for name, entry in held.items()}
