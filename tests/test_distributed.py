"""DistributedDataParallel and FSDP2 over two processes of torchrun on a CPU: the losses of one process.

Sharding a block keeps it fused; sharding what is inside one, whose parameters are then DTensors to the block, makes it
call its modules, and gives the same numbers.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from vitriton.vit.parallel import TORCHRUN

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="this PyTorch has no torch.distributed with gloo",
)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    file = tmp_path_factory.mktemp("two_processes") / "results.json"
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    process = subprocess.run(
        [*run, str(Path(__file__).with_name("two_processes.py")), str(file)],
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert process.returncode == 0, process.stderr
    return json.loads(file.read_text())


def assert_same_losses(result, expected, **tolerance):
    assert expected[0] != expected[-1]
    torch.testing.assert_close(torch.tensor(result), torch.tensor(expected), **tolerance)


@pytest.mark.parametrize("how", ["ddp", "ddp, accumulated", "ddp, compiled"])
def test_data_parallel(results, how):
    assert_same_losses(results[how], results["one"])


@pytest.mark.parametrize("level", ["block", "fn", "norm", "first Linear", "last Linear", "norm and first Linear"])
def test_fully_sharded(results, level):
    assert_same_losses(results[f"fsdp, {level}"], results["one"])


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_float16_with_a_scaler(results, how):
    """Gradients are rounded to fp16 in parts, and then summed: eps is 1e-3, and the loss feels a little of it."""
    assert_same_losses(results[f"{how}, fp16"], results["one, fp16"], rtol=1e-3, atol=0)


def test_a_sharded_block_stays_fused(results):
    assert results["operators, block"] == {"layer_norm_linear": 4, "qkv_attention": 2, "native_layer_norm": 1}
    assert results["operators, last Linear"] == results["operators, block"]


@pytest.mark.parametrize("level", ["fn", "norm", "first Linear", "norm and first Linear"])
def test_a_block_whose_children_are_sharded_calls_them(results, level):
    # attention itself stays fused: softmax holds no parameters
    assert results[f"operators, {level}"] == {"qkv_attention": 2, "native_layer_norm": 5, "gelu": 2}


def test_distributed_tensors(results):
    plain, fused = map(torch.tensor, results["DTensors"])
    torch.testing.assert_close(fused, plain)


def test_a_model_that_was_sharded_says_what_to_do(results):
    sharded = "fully_shard has given it a class of its own: "
    assert f"{sharded}fuse the model before it is sharded" in results["fused too late"]
    assert f"{sharded}unfuse a model that is not sharded" in results["unfused too late"]


@pytest.mark.parametrize(("environment", "written"), [({}, "finalized\n"), (dict.fromkeys(TORCHRUN, "1"), "")])
def test_processes_of_torchrun_end_without_finalizing_python(environment, written):
    """A thread of gloo's that asks for the GIL meanwhile would abort the process."""
    code = "import atexit; from vitriton.vit.parallel import leave; atexit.register(print, 'finalized'); leave(3)"
    kept = {name: value for name, value in os.environ.items() if name not in TORCHRUN}
    done = subprocess.run([sys.executable, "-c", code], env=kept | environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (3, written)
