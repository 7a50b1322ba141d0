"""No rank holds the whole model while it loads: measured, on two ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from training_runs import ROOT
from transformers import LlamaConfig, LlamaForCausalLM

MB = 1 << 20

PROGRAM = """
import gc, json, os, re, sys
from pathlib import Path
import torch
from alpaca.training import sharding

def resident(key):
    return int(re.search(key + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

mesh = sharding.start(torch.device("cpu"))
idle = resident("VmRSS")
module = sharding.build(Path(sys.argv[1]), mesh, torch.float32, torch.device("cpu"))
own = sum(p.to_local().nbytes for p in module.parameters())
layer = sum(p.numel() * 4 for p in module.model.model.layers[0].parameters())
facts = {"peak": resident("VmHWM") - idle, "own": own, "layer": layer}
Path(sys.argv[2], os.environ["RANK"]).write_text(json.dumps(facts))
"""


@pytest.fixture(scope="module")
def large_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 350 million fp32 parameters (1.4 GB) in one file; all of them 0.02."""
    folder = tmp_path_factory.mktemp("large") / "model"
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=17,
        num_attention_heads=16,
        dtype="float32",
    )
    with init_empty_weights():
        model = LlamaForCausalLM(config)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.02)
    model.save_pretrained(folder)
    assert (folder / "model.safetensors").stat().st_size > 1300 * MB
    return folder


def test_a_loading_rank_needs_its_shard_a_layer_and_little_more(
    large_model: Path, tmp_path: Path
) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    done = subprocess.run(
        [*launcher, str(program), str(large_model), str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    for rank in ("0", "1"):
        facts = json.loads((tmp_path / rank).read_text())
        assert facts["own"] > 650 * MB
        assert facts["peak"] < facts["own"] + facts["layer"] + 300 * MB
