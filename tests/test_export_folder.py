"""Exports that stay model folders or carry one: a tar file, another type, a Modelfile."""

import json
import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
import torch
from model_folders import copied, save, tensors
from training_runs import train

from alpaca import passport, verify
from alpaca.cli import main
from alpaca.folder import load_tokenizer
from alpaca.prompt import render
from alpaca.release import ollama
from alpaca.serving import archives


def export(folder: Path, to: str, output: Path, *flags: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["export", str(folder), "--to", to, "-o", str(output), *map(str, flags)])
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.fixture(scope="module")
def trained(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "alpaca_out"
    given = {"model_name_or_path": tiny_model, "output_dir": out, "max_steps": 1}
    done = train(*(f"--{name}={value}" for name, value in given.items()))
    assert done.returncode == 0, done.stderr
    return out


def test_a_tar_file_unpacks_to_the_folder(trained: Path, tmp_path: Path) -> None:
    assert export(trained, "tar", tmp_path / "a.tar") == 0
    with tarfile.open(tmp_path / "a.tar") as tar:
        assert "log.jsonl" not in tar.getnames()
    archives.unpack(tmp_path / "a.tar", tmp_path / "unpacked")
    for path in (tmp_path / "unpacked").iterdir():
        assert path.read_bytes() == (trained / path.name).read_bytes()
    verify.run(verify.parser().parse_args([str(tmp_path / "unpacked")]))


def test_in_another_type_and_smaller_files_it_keeps_where_it_is_from(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(trained, "fp16", tmp_path / "half", "--max_shard_size", "100KB") == 0
    assert len(list((tmp_path / "half").glob("*.safetensors"))) > 2
    assert export(trained, "fp32", tmp_path / "whole") == 0
    ours, whole = tensors(trained), tensors(tmp_path / "whole")
    assert all(whole[name].equal(value.float()) for name, value in ours.items())
    assert all(value.dtype == torch.float32 for value in whole.values())
    first, other = passport.read(trained), passport.read(tmp_path / "half")
    assert first is not None
    assert other is not None
    assert other["run"] == first["run"]
    assert other["result"] == {**first["result"], "eval_loss_exported": None}
    assert other["export"] == {"dtype": "fp16", "rounding": "nearest"}
    assert "exported as | fp16, rounding: nearest" in (tmp_path / "half/README.md").read_text()
    verify.run(verify.parser().parse_args([str(tmp_path / "half")]))


def test_a_folder_of_links_is_packed_with_what_they_name(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "links").mkdir()
    for path in trained.iterdir():
        if path.is_file():
            (tmp_path / "links" / path.name).symlink_to(path)
    assert export(tmp_path / "links", "tar", tmp_path / "new" / "a.tar") == 0
    archives.unpack(tmp_path / "new" / "a.tar", tmp_path / "unpacked")
    assert (tmp_path / "unpacked/config.json").read_bytes() == (
        trained / "config.json"
    ).read_bytes()


@pytest.mark.parametrize("to", ["ollama", "fp16", "tar", "gguf"])
def test_the_folder_itself_and_what_holds_it_are_never_replaced(
    trained: Path, tmp_path: Path, to: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for output in (trained, trained.parent):
        assert export(trained, to, output, "--force") == 2
        assert f"{output} would replace {trained}" in capsys.readouterr().err
    assert (trained / "model.safetensors").is_file()


def test_a_checkpoint_in_another_type_is_still_one(tiny_model: Path, tmp_path: Path) -> None:
    given = {"model_name_or_path": tiny_model, "output_dir": tmp_path / "out", "max_steps": 3}
    words = [f"--{name}={value}" for name, value in given.items()]
    done = train(*words, "--save_only_model", "--save_steps=2")
    assert done.returncode == 0, done.stderr
    assert export(tmp_path / "out/checkpoint-2", "fp16", tmp_path / "half") == 0
    recorded = passport.read(tmp_path / "half")
    assert recorded is not None
    assert recorded["checkpoint"] == 2
    assert "result" not in recorded


def test_another_models_own_template_is_not_lost_silently(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied(tiny_model, tmp_path / "instruct")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(
        json.dumps(settings | {"chat_template": "{{ 1 }}"})
    )
    assert export(folder, "fp16", tmp_path / "half") == 2
    assert "has a chat template of its own" in capsys.readouterr().err
    assert not (tmp_path / "half").exists()


def test_weights_that_do_not_fit_their_config_are_not_exported(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied(tiny_model, tmp_path / "cut")
    held = tensors(folder)
    del held["lm_head.weight"]
    save(folder, held)
    assert export(folder, "gguf", tmp_path / "a.gguf") == 2
    assert "lacks 1 tensor(s) (first: lm_head.weight)" in capsys.readouterr().err


def test_what_is_no_model_is_not_exported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(tmp_path / "nothing", "gguf", tmp_path / "a.gguf") == 2
    assert "There is no model folder" in capsys.readouterr().err


def test_a_changed_folder_is_not_exported(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "changed"
    shutil.copytree(trained, folder)
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(settings | {"top_k": 3}))
    assert export(folder, "gguf", tmp_path / "a.gguf") == 2
    assert "generation_config.json" in capsys.readouterr().err


def test_an_ollama_folder_holds_the_model_the_template_and_the_stop(
    trained: Path, tmp_path: Path
) -> None:
    assert export(trained, "ollama", tmp_path / "ollama", "--type", "Q8_0") == 0
    assert sorted(path.name for path in (tmp_path / "ollama").iterdir()) == [
        "Modelfile",
        "model.gguf",
    ]
    told = (tmp_path / "ollama" / "Modelfile").read_text()
    eos = load_tokenizer(trained).eos_token
    assert told.startswith("FROM ./model.gguf\n")
    assert f'PARAMETER stop "{eos}"' in told
    user = told.partition('"user" }}')[2].partition("{{- end }}")[0]
    asked = user.replace("{{ .Content }}", "Name three colors.")
    plain = asked.replace("{{ if $.System }}{{ $.System }}\n\n{{ end }}", "")
    assert plain == render("Name three colors.")
    assert ollama.template("E").endswith("{{ .Content }}E{{- end }}{{- end }}")


GO = """
package main

import ("encoding/json"; "os"; "text/template")

func main() {
	var given struct {
		Template string
		Asked []struct { System string; Messages []struct { Role, Content string } }
	}
	if err := json.NewDecoder(os.Stdin).Decode(&given); err != nil { panic(err) }
	parsed := template.Must(template.New("").Parse(given.Template))
	for _, one := range given.Asked {
		if err := parsed.Execute(os.Stdout, one); err != nil { panic(err) }
		os.Stdout.WriteString("\\x00")
	}
}
"""


@pytest.mark.skipif(shutil.which("go") is None, reason="needs Go, in whose templates Ollama writes")
def test_gos_own_templates_render_the_modelfiles_template_as_the_chat_template_does(
    trained: Path, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(trained)
    system, user = (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi {{ }}"},
    )
    reply, more = (
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": 'Ab "c"\n'},
    )
    chats = [[user], [user, reply, more], [system, user]]
    asked = [
        {
            "System": chat[0]["content"] if chat[0]["role"] == "system" else "",
            "Messages": [{name.title(): value for name, value in turn.items()} for turn in chat],
        }
        for chat in chats
    ]
    (tmp_path / "main.go").write_text(GO)
    done = subprocess.run(
        ["go", "run", "main.go"],
        cwd=tmp_path,
        env={**os.environ, "GOCACHE": str(tmp_path / "cache"), "GOFLAGS": "-mod=mod"},
        input=json.dumps({"template": ollama.template(str(tokenizer.eos_token)), "asked": asked}),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    expected = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
    bos = tokenizer.bos_token or ""
    assert done.stdout.split("\0")[:-1] == [text.removeprefix(bos) for text in expected]
