"""The examples of vit/README.md run."""

import re
from pathlib import Path

import pytest
from vitriton.kernels import use_backend

README = Path(__file__).parents[1] / "vit" / "README.md"
EXAMPLES = re.findall(r"^```python\n(.*?)^```$", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def library(example):
    found = re.findall(r"^(?:import|from) (timm|transformers|torchvision|open_clip|vit_pytorch)", example, re.MULTILINE)
    return found[0] if found else "vitriton"


@pytest.mark.parametrize("example", EXAMPLES, ids=map(library, EXAMPLES))
def test_example(example, capsys, monkeypatch, tmp_path):
    pytest.importorskip(library(example), reason=f"{library(example)} is not installed")
    monkeypatch.chdir(tmp_path)  # one writes a picture
    with use_backend("native"):
        exec(compile(example, str(README), "exec"), {"__name__": "example"})
    assert "print(fuse" not in example or "fused " in capsys.readouterr().out


def test_each_library_has_an_example():
    assert {library(example) for example in EXAMPLES} == {
        "vitriton", "timm", "transformers", "torchvision", "open_clip", "vit_pytorch"
    }  # fmt: skip
