"""Folders that no program here can use are refused by all of them, in one sentence."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from model_folders import (
    copied,
    flags,
    save,
    save_sharded,
    tensors,
    trained_loss,
    transformers_loss,
)
from reference import convert
from safetensors.torch import load_file
from training_runs import train
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from alpaca import golden, model, passport, stored
from alpaca.cli import main
from alpaca.errors import UserError
from alpaca.plan import shapes
from alpaca.recipe import arguments, packing
from alpaca.serving import loading
from alpaca.serving.attention import PrefillChunk
from alpaca.serving.cache import Capacity
from alpaca.serving.forward import Batch, SlotModel
from alpaca.serving.weights import Weights
from alpaca.training import attention, command
from alpaca.training.loss import TargetLoss


def refused(folder: Path, told: str, scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """train (before its ranks meet), plan, convert and serve all say it."""
    run, _ = arguments.parse(flags(folder, scratch / "run"))
    for refuse in (
        lambda: command.run(run),
        lambda: loading.load(Weights(folder, "a test"), {}),
    ):
        with pytest.raises(UserError) as caught:
            refuse()
        assert told in caught.value.happened
        assert caught.value.remedy
    assert not torch.distributed.is_initialized()
    capsys.readouterr()
    for verb in (
        ["plan", *flags(folder, scratch / "plan")],
        ["convert", "--input_dir", str(folder), "--output_dir", str(scratch / "converted")],
        ["serve", "--weights", str(folder)],
    ):
        with pytest.raises(SystemExit) as ended:
            main(verb)
        assert ended.value.code == 2
        assert told in capsys.readouterr().err
    assert not list(scratch.glob("converted/*"))


def fp8(folder: Path) -> None:
    held = tensors(folder)
    for name in [name for name in held if name.endswith("_proj.weight")]:
        scale = held[name].abs().max() / 448
        held[name + "_scale"] = scale.reshape(1)
        held[name] = (held[name] / scale).to(torch.float8_e4m3fn)
    save(folder, held)


def gptq(folder: Path) -> None:
    held = tensors(folder)
    for name in [name for name in held if name.endswith("_proj.weight")]:
        weight = held.pop(name)
        held[name.removesuffix("weight") + "qweight"] = torch.zeros(
            8, len(weight), dtype=torch.int32
        )
        held[name.removesuffix("weight") + "scales"] = torch.ones(1, len(weight)).half()
    save(folder, held)


def four_bits(folder: Path) -> None:
    """As bitsandbytes packs them."""
    held = tensors(folder)
    for name in [name for name in held if name.endswith("_proj.weight")]:
        held[name] = torch.zeros(held[name].numel() // 2, 1, dtype=torch.uint8)
        held[name + ".absmax"] = torch.ones(4)
    save(folder, held)


def double(folder: Path) -> None:
    save(folder, {name: tensor.double() for name, tensor in tensors(folder).items()})


def pointer(folder: Path) -> None:
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 13476\n"
    (folder / "model.safetensors").write_text(text)


def adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "somewhere"}')


def missing_shard(folder: Path) -> None:
    save_sharded(folder, tensors(folder))
    (folder / "model.safetensors").unlink()
    (folder / "model-00002-of-00002.safetensors").unlink()


def other_head(folder: Path) -> None:
    """A tied model whose output matrix is stored, and is another one."""


FAULTS: dict[str, tuple[Callable[[Path], None], dict[str, Any], str]] = {
    "fp8": (fp8, {}, "_proj.weight is F8_E4M3; weights are BF16, F16, F32."),
    "gptq": (gptq, {}, "qweight is I32; weights are"),
    "4 bits": (four_bits, {}, "is U8; weights are"),
    "fp64": (double, {}, "is F64; weights are"),
    "method": (gptq, {"quantization_config": {"quant_method": "gptq"}},
               "describes quantized weights (quantization_config: gptq)"),
    "old key": (fp8, {"compression_config": {"format": "dense"}},
                "describes quantized weights (compression_config: unnamed)"),
    "pointer": (pointer, {}, "model.safetensors is a Git LFS pointer"),
    "adapter": (adapter, {}, "holds an adapter (adapter_config.json)"),
    "missing shard": (missing_shard, {}, "model-00002-of-00002.safetensors is missing"),
    "other head": (other_head, {"tie_word_embeddings": True},
                   "says tie_word_embeddings, but the stored lm_head.weight is not"),
    "other file": (double, {"transformers_weights": "x.safetensors"}, "names another weights file"),
    "stablelm": (double, {"model_type": "stablelm"}, "describes a model of type stablelm, which "
                 "cannot be trained or served here"),
    "llama4": (double, {"model_type": "llama4"}, "describes a model of type llama4, which"),
    "no type": (double, {"model_type": None}, "describes a model of type None, which"),
    "capped": (double, {"final_logit_softcapping": 30.0},
               "describes a model of type llama with final_logit_softcapping"),
    "dynamic": (double, {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
                "rotary embedding (dynamic) changes with the longest sequence of a pass, so it "
                "cannot be trained or served here"),
    "dynamic, 2023": (double, {"rope_parameters": None, "rope_scaling": {"type": "dynamic"}},
                      "rotary embedding (dynamic) changes"),
    "longrope": (double, {"rope_parameters": {"full_attention": {"rope_type": "longrope"}}},
                 "rotary embedding (longrope) changes"),
    "unknown": (double, {"rope_parameters": {"rope_type": "spiral"}},
                "rotary embedding (spiral) is not supported"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_folder_that_cannot_be_used_is_refused_by_every_program_in_the_same_words(
    fault: str, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, config, told = FAULTS[fault]
    folder = copied(tiny_model, tmp_path / "in" / "model", **config)
    change(folder)
    refused(folder, told, tmp_path, capsys)


def test_an_adapter_without_a_model_is_called_an_adapter(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "in" / "adapter"
    folder.mkdir(parents=True)
    adapter(folder)
    save(folder, {"base_model.model.lora_A.weight": torch.ones(2, 2)}, "adapter_model.safetensors")
    refused(folder, "holds an adapter (adapter_config.json)", tmp_path, capsys)


def test_a_git_lfs_pointer_ends_training_with_one_sentence(
    tiny_model: Path, tmp_path: Path
) -> None:
    folder = copied(tiny_model, tmp_path / "model")
    pointer(folder)
    done = train(*flags(folder, tmp_path))
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert f"git -C {folder} lfs pull" in done.stderr


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json"])
def test_other_files_that_are_git_lfs_pointers_are_named(
    name: str, tiny_model: Path, tmp_path: Path
) -> None:
    folder = copied(tiny_model, tmp_path / "in" / "model")
    pointer(folder)
    (folder / "model.safetensors").replace(folder / name)
    save(folder, tensors(tiny_model))
    run, _ = arguments.parse(flags(folder, tmp_path))
    with pytest.raises(UserError, match=f"{name} is a Git LFS pointer"):
        command.run(run)
    code, said = convert("--input_dir", folder, "--output_dir", tmp_path / "out")
    assert code == 2
    assert f"{name} is a Git LFS pointer" in said


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda held: held.pop("model.layers.1.mlp.up_proj.weight"), "lacks 1 tensor"),
        (lambda held: held.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}),
         "holds 1 tensor(s) that a model of its config.json does not have (first: "
         "model.layers.0.self_attn.q_proj.bias"),
        (lambda held: held.update({"model.norm.weight": torch.ones(65)}),
         "model.norm.weight has shape [65], config.json implies [64]"),
    ],
)  # fmt: skip
def test_weights_of_another_config_are_refused_before_ranks_meet_and_by_plan_and_server(
    change: Callable[[dict[str, torch.Tensor]], None],
    told: str,
    tiny_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = copied(tiny_model, tmp_path / "model")
    held = tensors(folder)
    change(held)
    save(folder, held)
    run, _ = arguments.parse(flags(folder, tmp_path))
    for refuse in (
        lambda: command.run(run),
        lambda: loading.load(Weights(folder, "a test"), {}),
        lambda: shapes.find(folder),
    ):
        with pytest.raises(UserError) as caught:
            refuse()
        assert told in caught.value.happened


def with_biases(folder: Path) -> dict[str, Any]:
    changes = {"attention_bias": True, "mlp_bias": True}
    made = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder, **changes))
    for parameter in made.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)  # biases start at 0
    save(folder, dict(made.state_dict()))
    return changes


def with_buffers(folder: Path) -> dict[str, Any]:
    name = "model.layers.{}.self_attn.rotary_emb.inv_freq"
    save(folder, tensors(folder) | {name.format(i): torch.ones(8) for i in range(2)})
    return {}


def with_tied_head(folder: Path) -> dict[str, Any]:
    held = tensors(folder)
    save(folder, held | {"lm_head.weight": held["model.embed_tokens.weight"].clone()})
    return {"tie_word_embeddings": True}


@pytest.mark.parametrize("change", [with_biases, with_buffers, with_tied_head])
def test_plan_train_and_convert_agree_with_transformers_on_what_a_folder_holds(
    change: Callable[[Path], dict[str, Any]],
    tiny_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    torch.manual_seed(0)
    folder = copied(tiny_model, tmp_path / "in" / "model")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change(folder)))
    expected = transformers_loss(folder, tmp_path)
    code, said = convert("--input_dir", folder, "--output_dir", tmp_path / "converted")
    assert code == 0, said
    assert transformers_loss(tmp_path / "converted/model", tmp_path) == expected
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(SystemExit) as ended:
        main(["plan", *flags(folder, tmp_path / "plan")])
    assert ended.value.code == 0
    assert f"{loaded.num_parameters():,} parameters" in capsys.readouterr().out
    assert trained_loss(folder, tmp_path / "run") == pytest.approx(expected, rel=1e-5)
    exported = load_file(tmp_path / "run/out/model.safetensors")
    size = (tmp_path / "run/out/model.safetensors").stat().st_size
    assert json.loads(planned(folder, tmp_path, capsys))["export"] == size
    assert set(exported) == {name for name, _ in loaded.named_parameters()}


def planned(folder: Path, scratch: Path, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit):
        main(["plan", *flags(folder, scratch / "plan"), "--json"])
    return capsys.readouterr().out


TINY = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@pytest.mark.parametrize("kind", stored.DECODERS)
def test_each_decoder_that_is_let_through_trains_and_serves_as_transformers_computes_it(
    kind: str,
) -> None:
    torch.manual_seed(0)
    reference = tiny_decoder(AutoConfig.for_model(kind, **TINY), "eager").eval()
    for parameter in reference.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    ids = torch.randint(3, 96, (40,))
    with torch.no_grad():
        logits = reference(ids[None]).logits[0]
    trainer = tiny_decoder(AutoConfig.for_model(kind, **TINY), attention.NAME).eval()
    trainer.load_state_dict(reference.state_dict())
    pack = packing.plain(ids.tolist())
    with torch.no_grad():
        loss = TargetLoss(trainer)(
            ids,
            torch.arange(40),
            attention.index(pack.segments, torch.device("cpu")),
            torch.arange(39),
            ids[1:],
        )
    expected = torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="sum")
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    server = SlotModel(reference, torch.float32)
    server.allocate(server.probe(), Capacity(2, 64))
    served = server.run(Batch([], [(PrefillChunk(0, 0, 40), ids.tolist())], [39]))[0]
    torch.testing.assert_close(served, logits[-1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", stored.DECODERS)
def test_a_folder_of_each_decoder_as_transformers_writes_it_is_let_through(
    kind: str, tmp_path: Path
) -> None:
    tiny_decoder(AutoConfig.for_model(kind, **TINY), "eager").save_pretrained(tmp_path)
    model.check_weights(tmp_path)


def tiny_decoder(config: PreTrainedConfig, attending: str) -> Any:
    config.dtype = torch.float32
    return AutoModelForCausalLM.from_config(config, attn_implementation=attending)


@pytest.mark.parametrize("kind", stored.DECODERS)
def test_tying_that_config_json_does_not_mention_is_transformers_default(kind: str) -> None:
    given = {"model_type": kind}
    assert stored.is_tied(given) == AutoConfig.for_model(kind).tie_word_embeddings


@pytest.mark.parametrize("kind", shapes.PLANNED)
@pytest.mark.parametrize("biases", [False, True])
def test_a_plan_counts_the_tensors_that_transformers_makes(kind: str, biases: bool) -> None:
    config = TINY | {"attention_bias": biases, "mlp_bias": biases}
    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **config))
    shape = shapes.from_config({"model_type": kind, **config}, Path("config.json"))
    real = {name: tuple(value.shape) for name, value in made.named_parameters()}
    assert list(shape.tensors().items()) == list(real.items())


def test_golden_logits_need_no_rotary_kind_under_its_name_of_today(tiny_model: Path) -> None:
    config = json.loads((tiny_model / "config.json").read_text())
    config.pop("rope_parameters")
    for kind, computed in (("linear", True), ("yarn", False)):
        reason = golden.unsupported(config | {"rope_scaling": {"type": kind, "factor": 2.0}})
        assert (reason is None) == computed, reason


@pytest.mark.parametrize("number", ["nan", "inf", "-inf"])
def test_one_weight_that_is_no_number_is_refused_and_its_tensor_named(
    number: str, tiny_model: Path, tmp_path: Path
) -> None:
    folder = copied(tiny_model, tmp_path / "in" / "model")
    held = tensors(folder)
    name = "model.layers.1.mlp.up_proj.weight"
    held[name][100, 5] = float(number)  # of the second rank's rows, where there are two
    save(folder, held)
    told = f"{name} holds NaN or infinite numbers"
    for dtype in ("keep", "bf16", "fp16"):
        code, said = convert(
            "--input_dir", folder, "--output_dir", tmp_path / "out", "--dtype", dtype
        )
        assert code == 2
        assert told in said
        assert not (tmp_path / "out/model").exists()
    with pytest.raises(UserError, match=told):
        golden.record(folder)
    if number == "nan":
        done = train(*flags(folder, tmp_path), ranks=2)
        assert done.returncode != 0
        assert f"train: error: {folder / 'model.safetensors'}: {told}" in done.stderr
        assert not (tmp_path / "out/config.json").exists()


def test_a_model_of_nan_is_refused_before_anything_is_written(
    tiny_model: Path, tmp_path: Path
) -> None:
    folder = copied(tiny_model, tmp_path / "in" / "model")
    save(folder, {name: tensor * float("nan") for name, tensor in tensors(folder).items()})
    code, said = convert("--input_dir", folder, "--output_dir", tmp_path / "out")
    assert code == 2
    assert "model.embed_tokens.weight holds NaN or infinite numbers" in said
    done = train(*flags(folder, tmp_path))
    assert done.returncode == 2
    assert "holds NaN or infinite numbers, and so do 20 more tensors" in done.stderr
    for path in tmp_path.rglob("*.json"):
        json.loads(path.read_text(), parse_constant=pytest.fail)


def test_a_passport_holds_no_number_that_json_lacks(tiny_model: Path, tmp_path: Path) -> None:
    folder = copied(tiny_model, tmp_path / "model")
    passport.write(folder, "a test", result={"loss": float("nan"), "steps": [1, float("inf")]})
    text = (folder / passport.NAME).read_text()
    assert json.loads(text, parse_constant=pytest.fail)["result"] == {
        "loss": None,
        "steps": [1, None],
    }
    assert passport.read(folder) is not None


def test_convert_sees_a_nan_that_no_golden_prompt_reads(tiny_model: Path, tmp_path: Path) -> None:
    folder = copied(tiny_model, tmp_path / "in" / "model")
    held = tensors(folder)
    held["model.embed_tokens.weight"][-1, 0] = float("nan")
    save(folder, held)
    assert golden.record(folder) is not None
    code, said = convert("--input_dir", folder, "--output_dir", tmp_path / "out")
    assert code == 2
    assert "model.embed_tokens.weight holds NaN or infinite numbers" in said
