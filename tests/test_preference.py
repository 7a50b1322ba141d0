"""DPO of train.py is that of peft and transformers alone, and of TRL's DPOTrainer."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file
from training_runs import ROOT, finish, lines, losses, start, train, wait_until
from transformers import AutoModelForCausalLM

from alpaca.errors import UserError
from alpaca.folder import load_tokenizer
from alpaca.pairs import Pair, read_pairs
from alpaca.prompt import render
from alpaca.recipe import packing
from alpaca.recipe.arguments import PREFERENCE_RATE, parse
from alpaca.recipe.corpus import Corpus, open_corpus
from alpaca.tokens import Codec
from alpaca.training import attention
from alpaca.training.adapters import stored_name, switched_off
from alpaca.training.loss import TargetLoss, answer_logs
from alpaca.training.preference import MEASURES, pack_sums

STEPS, PAIRS, RATE, BETA, LONGEST = 4, 8, 1e-3, 0.1, 220
SLOW = pytest.mark.slow
CPU = torch.device("cpu")
PEERS = ROOT / ".venvs/peers/bin/python"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight pairs of both templates; the rejected answer is another task's. Some are cut."""
    seeds = [json.loads(line) for line in (ROOT / "data/seed_tasks.jsonl").read_text().splitlines()]
    chosen = [s for s in seeds if s["input"]][:3] + [s for s in seeds if not s["input"]][:5]
    others = [*chosen[1:], chosen[0]]
    pairs = [
        {
            "instruction": s["instruction"],
            "input": s["input"],
            "chosen": s["output"],
            "rejected": other["output"],
        }
        for s, other in zip(chosen, others, strict=True)
    ]
    path = tmp_path_factory.mktemp("data") / "pairs.json"
    path.write_text(json.dumps(pairs))
    return path


def words(base: Path, data: Path, out: Path, **more: Any) -> list[str]:
    flags = {
        "model_name_or_path": base,
        "data_path": data,
        "output_dir": out,
        "loss": "dpo",
        "dpo_beta": BETA,
        "model_max_length": LONGEST,
        "per_device_train_batch_size": PAIRS,
        "gradient_accumulation_steps": 1,
        "max_steps": STEPS,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0,
        "lora_rank": 6,
        **more,
    }
    return [f"--{name}={value}" for name, value in flags.items()]


def run(base: Path, data: Path, out: Path, ranks: int = 0, **more: Any) -> Path:
    done = train(*words(base, data, out, **more), ranks=ranks)
    assert done.returncode == 0, done.stderr
    return out


def weights(folder: Path) -> Tensors:
    held: Tensors = load_file(folder / "adapter_model.safetensors")
    return held


def relative(ours: Tensors, theirs: Tensors) -> float:
    assert ours.keys() == theirs.keys()
    apart = torch.cat([(ours[name] - theirs[name]).flatten() for name in theirs]).norm()
    return float(apart / torch.cat([one.flatten() for one in theirs.values()]).norm())


def ids_of(base: Path, data: Path) -> list[dict[str, list[int]]]:
    """Prompt and answers as token ids, uncut."""
    codec = Codec(load_tokenizer(base))
    found = []
    for pair in read_pairs(data):
        [prompt] = codec.prompts([render(pair.instruction, pair.input)])
        chosen, rejected = codec.answers([pair.chosen, pair.rejected])
        both = {"chosen_ids": [*chosen, codec.eos], "rejected_ids": [*rejected, codec.eos]}
        found.append({"prompt_ids": prompt, **both})
    return found


def log_probability(model: Any, prompt: list[int], answer: list[int]) -> torch.Tensor:
    ids = torch.tensor([[*prompt, *answer][:LONGEST]])
    logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float()
    return -F.cross_entropy(logits, ids[0, len(prompt) :], reduction="sum")


def by_peft(
    start_from: Path, base: Path, data: Path, smoothing: float
) -> tuple[Tensors, list[dict[str, float]]]:
    """Train from an adapter's first values, one answer at a time; the adapter, and the means."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, start_from, is_trainable=True)
    trained = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    pairs = ids_of(base, data)
    found = []
    for _ in range(STEPS):
        means = dict.fromkeys(("loss", *MEASURES), 0.0)
        for pair in pairs:
            both = [(pair["prompt_ids"], pair[name]) for name in ("chosen_ids", "rejected_ids")]
            with torch.no_grad(), model.disable_adapter():
                before = [log_probability(model, *one) for one in both]
            rewards = [
                BETA * (log_probability(model, *one) - old)
                for one, old in zip(both, before, strict=True)
            ]
            margin = rewards[0] - rewards[1]
            loss = -(1 - smoothing) * margin.sigmoid().log() - smoothing * (-margin).sigmoid().log()
            (loss / len(pairs)).backward()
            values = (loss, *rewards, margin, (margin > 0).float())
            for name, value in zip(means, values, strict=True):
                means[name] += value.item() / len(pairs)
        optimizer.step()
        optimizer.zero_grad()
        found.append(means)
    names = {
        name.replace(".default", ""): parameter.detach()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    return names, found


def check_means(out: Path, wanted: list[dict[str, float]]) -> None:
    logged = [line for line in lines(out) if "loss" in line]
    assert len(logged) == len(wanted) == STEPS
    assert wanted[-1]["rewards/margins"] > 0.02  # it learns, so the values below say something
    for ours, theirs in zip(logged, wanted, strict=True):
        for name, value in theirs.items():
            assert ours[name] == pytest.approx(value, rel=1e-5, abs=1e-5), name


@pytest.mark.parametrize(
    ("more", "ranks"),
    [
        ({}, 0),
        ({"gradient_checkpointing": True, "dpo_label_smoothing": 0.1}, 2),
        pytest.param({"packing": False, "fsdp": "no_shard"}, 2, marks=SLOW),
        pytest.param({"fsdp": "shard_grad_op"}, 2, marks=SLOW),
        pytest.param({"fsdp": "full_shard offload", "max_tokens_per_pack": 480}, 2, marks=SLOW),
        pytest.param({"max_tokens_per_pack": 480, "gradient_accumulation_steps": 4}, 0, marks=SLOW),
        pytest.param({"torch_compile": True}, 0, marks=SLOW),
    ],
)
def test_dpo_is_what_peft_and_transformers_alone_compute(
    more: dict[str, Any], ranks: int, tiny_model: Path, data: Path, tmp_path: Path
) -> None:
    first = run(tiny_model, data, tmp_path / "first", learning_rate=0, max_steps=1)
    smoothing = more.get("dpo_label_smoothing", 0.0)
    wanted, means = by_peft(first, tiny_model, data, smoothing)
    batch = PAIRS // max(1, ranks) // more.get("gradient_accumulation_steps", 1)
    out = run(
        tiny_model, data, tmp_path / "out", ranks, **{"per_device_train_batch_size": batch, **more}
    )
    check_means(out, means)
    assert relative(weights(out), wanted) < 2e-5
    assert relative(weights(out), weights(first)) > 1e-2  # so that the line above says something


def random_adapter(base: Path, folder: Path) -> Path:
    """An adapter that changes the model, by peft."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(
        task_type="CAUSAL_LM", r=6, lora_alpha=12, target_modules="all-linear",
        init_lora_weights=False,
    )  # fmt: skip
    get_peft_model(model, config).save_pretrained(folder)
    return folder


def module_of(base: Path, adapter: Path) -> TargetLoss:
    """A model with an adapter, as the trainer has it, without sharding."""
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, attn_implementation=attention.NAME
    )
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    inject_adapter_in_model(LoraConfig.from_pretrained(adapter), model)
    held = weights(adapter)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = held[stored_name(name)]
            parameter.requires_grad_(True)
    return TargetLoss(model.train())


def corpus_of(base: Path, data: Path, cache: Path) -> Corpus:
    return open_corpus(data, Codec(load_tokenizer(base)), cache, LONGEST, pairs=True)


def test_the_reference_is_the_base_and_both_answers_are_as_if_alone(
    tiny_model: Path, data: Path, tmp_path: Path
) -> None:
    adapter = random_adapter(tiny_model, tmp_path / "adapter")
    module = module_of(tiny_model, adapter)
    corpus = corpus_of(tiny_model, data, tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    tuned = PeftModel.from_pretrained(base, adapter)
    pairs = ids_of(tiny_model, data)
    assert any(len(p["prompt_ids"] + p["rejected_ids"]) > LONGEST for p in pairs)  # some are cut
    order = [i for kind in (0, 1) for i in range(PAIRS) if corpus.kinds[i] == kind]
    for padded in (False, True):
        pack = packing.build(corpus, range(PAIRS), padded=padded)
        ours = answer_logs(module, pack, CPU).detach()
        with switched_off(module.model):
            reference = answer_logs(module, pack, CPU).detach()
        wanted = [
            (pairs[i]["prompt_ids"], pairs[i][name])
            for i in order
            for name in ("chosen_ids", "rejected_ids")
        ]
        with torch.no_grad():
            theirs = torch.stack([log_probability(tuned, *one) for one in wanted])
            with tuned.disable_adapter():
                untuned = torch.stack([log_probability(tuned, *one) for one in wanted])
        torch.testing.assert_close(ours.float(), theirs, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(reference.float(), untuned, rtol=1e-5, atol=1e-4)
        assert (theirs - untuned).abs().min() > 0.1
    assert packing.build(corpus, range(PAIRS)).tokens < 0.8 * pack.tokens


@pytest.mark.parametrize("run", [attention.segmentwise, attention.blockwise])
def test_attention_equals_dense_attention_over_chains_of_prefixes(
    run: Any, tiny_model: Path, data: Path, tmp_path: Path
) -> None:
    corpus = corpus_of(tiny_model, data, tmp_path)
    pack = packing.build(corpus, range(PAIRS))
    found = attention.index(pack.segments, CPU)
    query, key, value = torch.randn(3, pack.tokens, 2, 8, dtype=torch.float64)
    ours = run(query, key, value, 0.3, found)
    for number, s in enumerate(found.segments):
        keys = found.gather[found.cu_k[number] : found.cu_k[number + 1]]
        before = len(keys) - (s.end - s.start)
        # a sequence's tokens are all attended to, once each, in their order
        assert pack.positions[keys.numpy()].tolist() == list(range(len(keys)))
        scores = torch.einsum("qhd,khd->hqk", query[s.start : s.end], key[keys]) * 0.3
        future = torch.ones(scores.shape[1:], dtype=torch.bool).triu(before + 1)
        mixed = scores.masked_fill(future, -torch.inf).softmax(-1)
        wanted = torch.einsum("hqk,khd->qhd", mixed, value[keys])
        torch.testing.assert_close(ours[s.start : s.end], wanted)
    assert pack.attended() == sum(
        sum(range(int(pack.positions[s.start]) + 1, int(pack.positions[s.end - 1]) + 2))
        for s in pack.segments
    )


def test_packs_change_no_gradient_and_a_pack_without_pairs_has_none(
    tiny_model: Path, data: Path, tmp_path: Path
) -> None:
    module = module_of(tiny_model, random_adapter(tiny_model, tmp_path / "adapter"))
    corpus = corpus_of(tiny_model, data, tmp_path)
    whole = [packing.build(corpus, range(PAIRS))]
    parts = [packing.build(corpus, part) for part in ([0, 5], [1], [2, 3, 4], [6, 7])]
    ours, theirs = (gradient(module, packs) for packs in (whole, [*parts, packing.idle(corpus, 0)]))
    assert relative(ours, theirs) < 1e-5
    nothing = gradient(module, [packing.idle(corpus, 0)])
    assert not any(value.any() for value in nothing.values())


def gradient(module: TargetLoss, packs: list[packing.Pack]) -> Tensors:
    """By PEFT's names, of the mean over all pairs."""
    module.zero_grad()
    for pack in packs:
        (pack_sums(module, pack, CPU, (), beta=BETA)[0] / PAIRS).backward()
    return {
        stored_name(name): parameter.grad.clone()
        for name, parameter in module.model.named_parameters()
        if parameter.grad is not None
    }


def trl(job: Path, base: Path, data: Path, adapter: Path, steps: int, rate: float) -> Any:
    """What TRL's trainer measures in each step, from an adapter on."""
    told = {
        "base": str(base),
        "beta": BETA,
        "max_length": LONGEST,
        "steps": steps,
        "rate": rate,
        "pairs": ids_of(base, data),
    }
    job.mkdir()
    (job / "job.json").write_text(json.dumps(told))
    (job / "adapter").symlink_to(adapter)
    done = subprocess.run(
        [PEERS, ROOT / "tests/trl_dpo.py", job],
        cwd=job,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads((job / "done.json").read_text())


@SLOW
@pytest.mark.skipif(not PEERS.exists(), reason="python bench/peers.py makes .venvs/peers")
def test_losses_rewards_and_gradients_are_those_of_trls_trainer(
    tiny_model: Path, data: Path, tmp_path: Path
) -> None:
    adapter = random_adapter(tiny_model, tmp_path / "adapter")
    [means] = trl(tmp_path / "one", tiny_model, data, adapter, 1, 0.0)
    module = module_of(tiny_model, adapter)
    corpus = corpus_of(tiny_model, data, tmp_path)
    packs = [packing.build(corpus, part) for part in (range(5), range(5, PAIRS))]
    ours = sum(pack_sums(module, pack, CPU, (), beta=BETA).detach() for pack in packs) / PAIRS
    for name, value in zip(("loss", *MEASURES), ours.tolist(), strict=True):
        assert value == pytest.approx(means[name], rel=1e-5, abs=1e-5), name
    assert abs(means["rewards/margins"]) > 0.01
    wanted = {
        name.replace(".default", ""): value
        for name, value in load_file(tmp_path / "one" / "gradient").items()
    }
    assert relative(gradient(module, packs), wanted) < 1e-5

    first = run(tiny_model, data, tmp_path / "first", learning_rate=0, max_steps=1)
    theirs = trl(tmp_path / "four", tiny_model, data, first, STEPS, RATE)
    out = run(tiny_model, data, tmp_path / "out")
    check_means(out, theirs)
    assert relative(weights(out), weights(tmp_path / "four" / "trained")) < 2e-5


def test_a_killed_run_goes_on_bit_for_bit_and_another_loss_is_another_run(
    tiny_model: Path, data: Path, tmp_path: Path
) -> None:
    more = {"max_steps": 8, "save_steps": 2, "keep_last_checkpoint": True, "lora_dropout": 0.1}
    more |= {"eval_data_path": data, "eval_strategy": "steps", "eval_steps": 4}
    whole, out = tmp_path / "whole", tmp_path / "out"
    run(tiny_model, data, whole, **more)
    job = start([sys.executable, "train.py", *words(tiny_model, data, out, **more)])
    wait_until(lambda: bool(list(out.glob("checkpoint-*"))), job)
    job.send_signal(signal.SIGKILL)
    job.communicate()
    for changed in ({"dpo_beta": 0.2}, {"dpo_label_smoothing": 0.1}):
        refused = train(*words(tiny_model, data, out, **{**more, **changed}))
        assert refused.returncode == 2
        assert "loss (--loss, --dpo_beta" in refused.stderr
    finish([sys.executable, "train.py", *words(tiny_model, data, out, **more)])
    assert losses(out) == losses(whole)
    ours, theirs = weights(out), weights(whole)
    assert all(ours[name].equal(theirs[name]) for name in theirs)
    evaluations = [line for line in lines(out) if "eval_loss" in line]
    assert [line["step"] for line in evaluations] == [0, 4, 8]
    assert all(f"eval_{name}" in line for line in evaluations for name in MEASURES)
    assert evaluations[-1]["eval_rewards/accuracies"] > evaluations[0]["eval_rewards/accuracies"]
    held = json.loads((out / "passport.json").read_text())["run"]
    assert held["dpo"] == {"beta": BETA, "label_smoothing": 0.0}
    card = (out / "README.md").read_text()
    assert "DPO" in card
    assert "beta 0.1" in card
    watched = finish([sys.executable, "-m", "alpaca", "watch", str(out), "--once"])
    assert f"{losses(out)[-1]:.4f}" in watched


# ---- flags


def test_the_flags_of_llama_factory_and_trl_mean_these() -> None:
    factory, notices = parse(
        ["--stage", "dpo", "--finetuning_type", "lora", "--pref_beta", "0.3", "--pref_loss=sigmoid"]
    )
    assert (factory.loss, factory.dpo_beta, factory.lora_rank) == ("dpo", 0.3, 16)
    assert factory.learning_rate == PREFERENCE_RATE
    assert any("--loss dpo" in notice for notice in notices)
    theirs, _ = parse(["--loss=dpo", "--use_peft", "--beta=0.2", "--loss_type", "sigmoid"])
    assert theirs.dpo_beta == 0.2
    assert parse(["--stage=sft"])[0].loss == "sft"
    assert parse(["--loss=dpo", "--lora_r=4"])[0].pack_tokens == 2 * 4 * 512


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--loss=dpo"], "--loss dpo without an adapter"),
        (["--dpo_beta=0.2"], "--dpo_beta 0.2: it is a setting of DPO"),
        (["--loss=dpo", "--lora_rank=4", "--dpo_beta=0"], "--dpo_beta must be above 0"),
        (["--loss=dpo", "--lora_rank=4", "--dpo_label_smoothing=0.5"], r"must be in \[0, 0.5\)"),
        (["--loss=dpo", "--lora_rank=4", "--joint_tokenization"], "share their prompt"),
        (["--loss=dpo", "--lora_rank=4", "--max_tokens_per_pack=600"], "two answers"),
        (["--pref_loss=orpo"], "--pref_loss orpo is not known here"),
        (["--stage=rm"], "--stage rm is not known here"),
    ],
)
def test_flags_that_make_no_dpo_are_refused(flags: list[str], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        parse(flags)


# ---- data


PAIR = Pair(instruction="Name a colour.", chosen="Blue.", rejected="Seven.")
USER = {"role": "user", "content": "Name a colour."}
GOOD, BAD = ({"role": "assistant", "content": text} for text in ("Blue.", "Seven."))
TEXTS = {"chosen": "Blue.", "rejected": "Seven."}
HUMAN = {"from": "human", "value": "Name a colour."}


def read(folder: Path, *items: Any) -> list[Pair]:
    path = folder / "pairs.json"
    path.write_text(json.dumps(items))
    return read_pairs(path)


@pytest.mark.parametrize(
    "item",
    [
        {"instruction": "Name a colour.", "input": "", **TEXTS},
        {"prompt": "Name a colour.", **TEXTS},
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD], "score_chosen": 9.0},
        {"prompt": "Name a colour.", "chosen": [USER, GOOD], "rejected": [USER, BAD],
         "messages": [USER, GOOD], "prompt_id": "a1"},
        {"conversations": [HUMAN], "chosen": {"from": "gpt", "value": "Blue."},
         "rejected": {"from": "gpt", "value": "Seven."}},
        {"messages": [{"role": "system", "content": ""}, USER], "chosen": GOOD, "rejected": BAD},
    ],
)  # fmt: skip
def test_every_form_of_a_pair_is_the_same_pair(item: dict[str, Any], tmp_path: Path) -> None:
    assert read(tmp_path, item) == [PAIR]


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        ({"prompt": [{"role": "system", "content": "Be brief."}, USER], **TEXTS},
         "record 1: prompt: a system message"),
        ({"prompt": [USER, GOOD, USER], **TEXTS}, "record 1: prompt: earlier turns"),
        ({"chosen": [USER, GOOD, USER, GOOD], "rejected": [USER, GOOD, USER, BAD]},
         "record 1: chosen: earlier turns"),
        ({"chosen": [USER, GOOD], "rejected": [HUMAN | {"value": "Name a fish."}, BAD]},
         "record 1: chosen and rejected begin differently"),
        ({"prompt": "Name a fish.", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
         "record 1: prompt and chosen ask different things"),
        ({"prompt": [USER], "chosen": [USER], "rejected": [BAD]}, "not the assistant's"),
        ({"prompt": [USER | {"role": "tool"}], **TEXTS}, "record 1: prompt: a message of role"),
        ({"prompt": [USER | {"tool_calls": [1]}], **TEXTS}, "a message with tool_calls"),
        ({"prompt": [{"role": "user", "content": [{"type": "image"}]}], **TEXTS}, "without a text"),
        (TEXTS, "record 1: has no instruction and no prompt"),
        ({"prompt": "Hi", "chosen": "Hello"}, "record 1: rejected: is missing"),
        ({"prompt": "Hi", "chosen": 1, "rejected": "No"}, "record 1: chosen: is neither a text"),
        ({"prompt": "Hi", "chosen": "\ud800", "rejected": "No"}, "record 1: chosen: holds half"),
        ({"prompt": "Hi", "chosen": "Yes", "rejected": " "}, "record 1: rejected: is empty except"),
        ({"prompt": "Hi", "output": "Ha", **TEXTS}, "record 1: output: a third answer"),
        ("text", "record 1: is not an object"),
        ({"prompt": "Hi", "system": "Be brief.", **TEXTS}, "system .1 of 3, first record 1"),
        ({"prompt": "Hi", "history": [["a", "b"]], **TEXTS}, "history .1 of 3, first record 1"),
    ],
)  # fmt: skip
def test_what_the_template_has_no_place_for_is_refused_by_its_number(
    item: Any, expected: str, tmp_path: Path
) -> None:
    good = {"prompt": "Name a colour.", **TEXTS}
    with pytest.raises(UserError, match=expected):
        read(tmp_path, good, item, good)


def test_a_pair_with_two_equal_answers_and_unread_keys_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    same = {"prompt": "Hi", "chosen": "Yes", "rejected": "Yes", "source": "a"}
    read(tmp_path, same, {"prompt": "Hi", **TEXTS})
    told = capsys.readouterr().err
    assert "1 pair(s) have the same answer twice" in told
    assert "source (1)" in told
    assert "chosen (" not in told


def test_the_audit_reads_pairs_and_its_copy_keeps_them(tmp_path: Path) -> None:
    good = {"prompt": "Name a colour.", **TEXTS}
    odd = {"prompt": [USER, GOOD, USER], **TEXTS}
    bad = {"prompt": "Name a fish.", "system": "Be brief.", **TEXTS}
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(item) + "\n" for item in (good, odd, bad)))
    words = ["--drop", "system", "--leave_out", "invalid", "--write-clean"]
    clean = tmp_path / "clean.jsonl"
    told = finish([sys.executable, "-m", "alpaca", "audit", str(path), *words, str(clean)])
    assert "preference pairs" in told
    assert "earlier turns" in told
    assert read_pairs(clean) == [
        PAIR,
        Pair(instruction="Name a fish.", chosen="Blue.", rejected="Seven."),
    ]


def test_data_of_the_other_loss_is_refused_with_the_flag_to_change(
    tiny_model: Path, data: Path, tmp_path: Path
) -> None:
    seeds = ROOT / "data/seed_tasks.jsonl"
    refused = train(*words(tiny_model, seeds, tmp_path / "out"))
    assert refused.returncode == 2
    assert "leave --loss dpo out" in refused.stderr
    refused = train(*words(tiny_model, data, tmp_path / "out", loss="sft"))
    assert refused.returncode == 2
    assert "train.py --loss dpo" in refused.stderr


@pytest.mark.parametrize("packed", [True, False])
def test_a_plan_counts_what_the_run_computes(
    packed: bool, tiny_model: Path, data: Path, tmp_path: Path
) -> None:
    flags = words(tiny_model, data, tmp_path / "out", packing=packed)
    printed = finish([sys.executable, "-m", "alpaca", "plan", *flags, "--json"])
    work = json.loads(printed)["work"]
    corpus = corpus_of(tiny_model, data, tmp_path)
    pack = packing.build(corpus, range(PAIRS), padded=not packed)  # a step is one pack
    assert work["tokens"] == STEPS * pack.tokens
    assert work["targets"] == STEPS * pack.targets
    assert work["attended"] == STEPS * pack.attended()
    assert work["largest"]["keys"] == len(attention.index(pack.segments, CPU).gather)
    ids = ids_of(tiny_model, data)
    alone = [
        min(LONGEST, len(one["prompt_ids"]) + len(one[name]))
        for one in ids
        for name in ("chosen_ids", "rejected_ids")
    ]
    assert work["real"] == STEPS * sum(alone)
    assert work["padded"] == STEPS * max(alone) * 2 * PAIRS


def test_identical_prompts_share_all_of_their_prompt(tiny_model: Path, tmp_path: Path) -> None:
    items = [{"prompt": "Hi", "chosen": text, "rejected": "No"} for text in ("Yes", "Hello there")]
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps(items))
    corpus = corpus_of(tiny_model, path, tmp_path)
    assert corpus.prefix_lengths[0] == corpus.prompt_lengths[0]
    pack = packing.build(corpus, [0, 1])
    answers = np.concatenate([answer for i in (0, 1) for answer in corpus.answers(i)])
    assert pack.labels.tolist() == answers.tolist()
    assert pack.tokens == corpus.prompt_lengths[0] + len(answers)
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    wanted = [
        log_probability(base, one["prompt_ids"], one[name]).item()
        for one in ids_of(tiny_model, path)
        for name in ("chosen_ids", "rejected_ids")
    ]
    packed = AutoModelForCausalLM.from_pretrained(
        tiny_model, dtype=torch.float32, attn_implementation=attention.NAME
    ).requires_grad_(False)
    assert answer_logs(TargetLoss(packed), pack, CPU).tolist() == pytest.approx(wanted, rel=1e-5)
