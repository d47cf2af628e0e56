"""Runs of `vitriton bench` from its command line: table, JSON, CSV, pictures, an earlier run to compare, bad arguments.

Time is a stand-in that the rivals themselves advance; sizes are tiny.
"""

import csv
import json
import time

import pytest
import torch
from stand_ins import CPU, Clock, bench, peer
from vitriton.vit import measure
from vitriton.vit.bench import charts, models, peers, report, roofline, run
from vitriton.vit.bench.models import ModelCase, ModelRace
from vitriton.vit.cli import main

pytest_plugins = ["stand_ins"]
pytestmark = pytest.mark.usefixtures("unguarded", "tiny")


def test_ceilings_are_operations_over_the_fastest_time(monkeypatch):
    class Ticks(Clock):
        def time(self, call, count):
            call()
            return [0.5, *[0.25] * (count - 1)]

    monkeypatch.setattr(roofline, "CPUClock", Ticks)
    monkeypatch.setattr(roofline, "SIDES_CPU", (8, 16))
    monkeypatch.setattr(roofline, "COPY", 1024)
    found = roofline.ceilings(CPU, ["float32"])
    assert found["products"] == {"float32": 2 * 16**3 / 0.25} and found["by"]["float32"].endswith("16 x 16")
    assert found["copy"] == 2 * 1024 / 0.25


def a_record(rival, seconds=1.0, spread=0.1, **other):
    record = {"kind": "model", "name": "ViT-B/16", "image_size": 224, "tokens": 197, "batch": 8, "dtype": "float32"}
    record |= {"device": "cpu", "what": "forward", "rival": rival, "status": "timed", "seconds": seconds}
    record |= {"p20": seconds * (1 - spread), "p80": seconds * (1 + spread), "calls": 9, "disturbed": False}
    return record | {"images_per_s": 8 / seconds, "peak_bytes": 10**6, "flops": 10**9, "bytes": 10**7} | {
        "tflops_per_s": 0.1, "gb_per_s": 2.0, "times_plain": 1.0
    } | other  # fmt: skip


MACHINE = {"device": "A CPU, 2 threads", "cpu": "A CPU", "threads": 2, "versions": {"torch": "2.14", "vitriton": "1"}}


def test_what_became_slower_than_the_noise():
    old = {
        "machine": MACHINE,
        "records": [
            a_record("vitriton", 1.0, 0.02),
            a_record("plain", 1.0, 0.2),
            a_record("timm", 1.0, 0.02),
            a_record("sdpa", 1.0, 0.001),
            a_record("compile", 1.0, 0.02),
            a_record("gone", 1.0),
        ],
    }
    now = [
        a_record("vitriton", 1.1, 0.02),
        a_record("plain", 1.04, 0.2),  # within its spread
        a_record("timm", 0.9, 0.02),
        a_record("sdpa", 1.015, 0.001),  # outside its spread, but by less than 2%
        a_record("compile", 2.0, 0.02, disturbed=True),
        a_record("new", 1.0),
        {"rival": "wrong", "status": "WRONG", "why": "so"},
    ]
    changes, doubts = report.compare_runs(now, MACHINE, old)
    assert {change["rival"]: change["verdict"] for change in changes} == {
        "vitriton": "SLOWER", "plain": "as before", "timm": "faster", "sdpa": "as before", "compile": "not judged"
    }  # fmt: skip
    assert changes[0]["ratio"] == pytest.approx(1.1) and not doubts
    other = MACHINE | {"threads": 4, "versions": MACHINE["versions"] | {"torch": "2.15", "vitriton": "2"}}
    _, doubts = report.compare_runs([a_record("plain", 1.5)], other, old)
    assert [doubt.split(",")[0].split(" take")[0] for doubt in doubts] == [
        "another threads: 2 then", "another torch: 2.14 then", "the plain formulas"
    ]  # fmt: skip


def test_pictures_are_drawn_for_what_there_is(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed, so there are no pictures")
    of_models = [a_record(rival, 1 + i / 7) for i, rival in enumerate(["vitriton", "plain", "timm:ghostnet_100"])]
    of_functions = [
        a_record(
            rival, 0.001 * n, kind="function", name=f"{question}, s", question=question, tokens=n, dtype=dtype,
            image_size=None, peak_bytes=None if rival == "odd" else n**2, flops=n**2, bytes=n,
        )
        for question in ("attention", "block")
        for dtype in ("float32", "bfloat16")
        for rival in ("vitriton", "plain", "SDPA", "odd")
        for n in (50, 197, 1025)
    ]  # fmt: skip
    roof = {"products": {"float32": 4e11, "bfloat16": 8e11}, "copy": 3e10, "cached copy": 1e11}
    wrong = [{"rival": "x", "status": "WRONG", "kind": "model", "why": ""}]
    assert charts.draw_all(tmp_path, wrong, MACHINE, None) == []
    paths = charts.draw_all(tmp_path, of_models + of_functions + wrong, MACHINE, roof)
    assert [path.name for path in paths] == ["models.png", "speed.png", "memory.png", "roofline.png"]
    for path in paths:
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 10_000
    assert [p.name for p in charts.draw_all(tmp_path, of_models, MACHINE, roof)] == ["models.png"]


def test_a_run_writes_table_json_csv_and_pictures(tmp_path, monkeypatch, capsys, rivals):
    monkeypatch.chdir(tmp_path)
    args = ("--batch", "2,3", "--json", "a.json", "--csv", "a.csv", "--plot", "pictures")
    assert bench(*args) == 0
    out = capsys.readouterr().out
    assert "missing: absent: no-such-package is not installed" in out
    assert "wrong is not timed, its answer is WRONG: logits: max error" in out
    assert "raises is not timed, as it does not run here: NotImplementedError: no kernel" in out
    assert "OK: 8 rivals timed in 2 cases" in out
    result = json.loads((tmp_path / "a.json").read_text())
    assert result["ok"] and result["machine"]["threads"] == torch.get_num_threads()
    assert result["machine"]["versions"]["torch"] == torch.__version__ or result["machine"]["versions"]["torch"]
    assert {r["batch"] for r in result["records"]} == {2, 3}
    with open("a.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(result["records"]) == 14
    assert rows[0]["rival"] == "vitriton" and float(rows[0]["seconds"]) == 1.0 and rows[0]["version of torch"]
    assert (tmp_path / "pictures" / "models.png").exists()


def test_an_earlier_run_is_compared_and_a_slower_one_fails(tmp_path, monkeypatch, capsys, rivals):
    monkeypatch.chdir(tmp_path)
    assert bench("--json", "a.json", "--plot", "", "--compare", "threefold") == 0
    earlier = json.loads((tmp_path / "a.json").read_text())
    for record in earlier["records"]:
        for name in ("seconds", "p20", "p80") if record["rival"] == "vitriton" else ():
            record[name] /= 2
    (tmp_path / "old.json").write_text(json.dumps(earlier))
    capsys.readouterr()
    assert bench("--plot", "", "--compare", "threefold,a.json") == 0
    assert "Beside a.json: 3 cases that both timed" in capsys.readouterr().out
    assert bench("--plot", "", "--compare", "threefold,old.json") == 1
    out = capsys.readouterr().out
    assert "SLOWER" in out and "FAILED: vitriton takes 2.00 times as long as in old.json" in out


def test_a_wrong_answer_of_ours_fails(monkeypatch, tmp_path, capsys, rivals):
    monkeypatch.setitem(models.PEERS, "vitriton", peer(1.0, 1.01))
    monkeypatch.chdir(tmp_path)
    assert bench("--plot", "", "--compare", "threefold", "--json", "a.json") == 1
    assert "FAILED: vitriton, ViT-Xs/16: logits: max error" in capsys.readouterr().out
    result = json.loads((tmp_path / "a.json").read_text())
    assert not result["ok"] and result["records"][0]["status"] == "WRONG" and "seconds" not in result["records"][0]


def test_functions_are_run_for_each_n(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    started = time.perf_counter()
    args = ("--function", "attention", "--tokens", "5,17", "--compare", "sdpa", "--step", "both", "--plot", "")
    assert bench(*args, "--json", "a.json") == 0
    assert time.perf_counter() - started < 60
    result = json.loads((tmp_path / "a.json").read_text())
    records, ceilings = result["records"], result["ceilings"]
    assert ceilings["products"]["float32"] > 0 and ceilings["copy"] > 0  # for a roofline drawn later
    assert {(r["tokens"], r["what"]) for r in records} == {
        (n, w) for n in (5, 17) for w in ("forward", "forward+backward")
    }
    assert {"vitriton", "plain", "SDPA", "SDPA math"} <= {r["rival"] for r in records}
    forward = next(r for r in records if r["tokens"] == 17 and r["what"] == "forward" and r["rival"] == "plain")
    assert forward["flops"] == 4 * 2 * 17 * 17 * 32 and forward["bytes"] == 4 * 4 * 17 * 64
    assert forward["peak_bytes"] > 0 and forward["p20"] <= forward["seconds"] <= forward["p80"]


def test_costs_are_counted(capsys):
    assert main(["bench", "--cost", "--model", "ti,b"]) == 0
    out = capsys.readouterr().out
    assert "17.56 G" in out and "86.54 M" in out


@pytest.mark.parametrize(
    "args, message",
    [
        (["--model", "resnet"], "--model 'resnet' is no size of ViT; allowed are ti, s, b"),
        (["--model", "vit_b0"], "--model 'vit_b0' is no size of ViT"),
        (["--dtype", "fp8"], "--dtype fp8 is none of fp32, bf16, fp16"),
        (["--function", "softmax"], "--function softmax is none of attention, "),
        (["--compare", "tensorflow"], "--compare tensorflow is none of vitriton, plain, sdpa, "),
        (["--compare", "no/such.json"], "cannot read --compare no/such.json: No such file"),
        (["--compare", "a.json"], "--compare a.json was not written by `vitriton bench --json`"),
        (["--batch", "1,x"], "--batch 1,x must be positive whole numbers"),
        (["--image-size", "100"], "--image-size 100 is no multiple of the patch size 16 of ti"),
        (["--csv", "no/such/a.csv"], "cannot write --csv no/such/a.csv"),
        (["--device", "cuda:99"], "--device cuda:99 cannot be used"),
        (["--plot", "a.json/x"], "cannot make the folder --plot a.json/x"),
    ],
)
def test_bad_arguments_end_before_anything_runs(args, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.json").write_text("{}")
    monkeypatch.setattr(run, "run_cell", lambda *_: pytest.fail("it ran"))
    assert main(["bench", *args]) == 2
    assert message in capsys.readouterr().err


def test_a_network_that_timm_does_not_know_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(run, "INTERPRET", False)
    if not peers.version("timm"):
        pytest.skip("timm is not installed")
    assert main(["bench", "--compare", "timm:no_such_net"]) == 2
    assert "--compare timm:no_such_net: timm knows no such model" in capsys.readouterr().err


def test_a_choice_that_cannot_run_is_said(monkeypatch, capsys):
    def explain(x):
        raise RuntimeError("VITRITON_CPU_LINEAR is 'compiled', which cannot run: there is no g++")

    monkeypatch.setattr(measure, "explain", explain)
    monkeypatch.setattr(run, "INTERPRET", False)
    monkeypatch.setattr(run, "run_cell", lambda *_: pytest.fail("it ran"))
    assert main(["bench", "--device", "cpu"]) == 2
    assert "which cannot run: there is no g++; unset it" in capsys.readouterr().err


def test_the_interpreter_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(run, "INTERPRET", True)
    assert main(["bench"]) == 2
    assert "TRITON_INTERPRET is set" in capsys.readouterr().err


def test_another_network_is_timed_and_not_judged(stand_in):
    if not peers.version("timm"):
        pytest.skip("timm is not installed")
    case = ModelCase("xs", 16, 224, 1, torch.float32, CPU, False)
    race = ModelRace(case, ["plain", "timm:ghostnet_100", "timm:no_such_net"])
    assert race.wrong["timm:ghostnet_100"] == "" and "timm:ghostnet_100" in race.right()
    assert "no_such_net" in race.wrong["timm:no_such_net"] and "timm:no_such_net" in race.raised
    assert 0.13e9 < race.flops("timm:ghostnet_100") / 2 < 0.16e9  # Han et al. 2020: 141 million


def test_without_memory_for_the_plain_model_the_rest_goes_on(monkeypatch, tmp_path, capsys, rivals):
    run_cell, cells = run.run_cell, []

    def first_fails(cell, *args):
        cells.append(cell)
        if len(cells) == 1:
            raise torch.OutOfMemoryError("tried to allocate 9 GiB\nand so on")
        return run_cell(cell, *args)

    monkeypatch.setattr(run, "run_cell", first_fails)
    monkeypatch.chdir(tmp_path)
    assert bench("--batch", "1,2", "--plot", "", "--compare", "threefold") == 0
    out = capsys.readouterr().out
    assert "plain is not timed, as it does not run here: out of memory: tried to allocate 9 GiB" in out
    assert "OK: 3 rivals timed in 2 cases" in out
