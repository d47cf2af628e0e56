"""What the tests of `vitriton bench` share: a tiny size of ViT, and rivals who take the time that they say.

A pytest plugin, for its fixtures: `pytest_plugins = ["stand_ins"]` in a test file. PYTEST_DONT_REWRITE.
"""

import pytest
import torch
from torch import nn
from vitriton.kernels import use_backend
from vitriton.vit import ViT
from vitriton.vit.bench import models, run
from vitriton.vit.bench.models import PEERS, Peer
from vitriton.vit.bench.race import Contest
from vitriton.vit.bench.sizes import SIZES
from vitriton.vit.cli import main
from vitriton.vit.modules import FusedViT
from vitriton.vit.reference import Preset

CPU = torch.device("cpu")
TINY = Preset(patch_size=16, dim=64, depth=2, heads=2, mlp_dim=128, parameters=0)


@pytest.fixture
def tiny(monkeypatch):
    """A size "xs", everything on the native path, as in a process without TRITON_INTERPRET."""
    monkeypatch.setitem(SIZES, "xs", TINY)
    monkeypatch.setattr(run, "INTERPRET", False)
    with use_backend("native"):
        yield


class Clock:
    """A stand-in: seconds go by only where a rival says so."""

    now = 0.0

    def settle(self):
        pass

    def disturbed(self):
        return False

    def time(self, call, count):
        times = []
        for _ in range(count):
            start = Clock.now
            call()
            times.append(Clock.now - start)
        return times


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setattr(Contest, "clock", lambda self: Clock())


def taking(seconds, answer):
    def rival(*args):
        Clock.now += seconds
        return answer(*args)

    return rival


class Slow(nn.Module):
    """A model that takes `seconds` more, and whose logits are `factor` times the right ones."""

    def __init__(self, model, seconds, factor=1.0):
        super().__init__()
        self.model, self.seconds, self.factor = model, seconds, factor

    def forward(self, images):
        Clock.now += self.seconds
        return self.factor * self.model(images)


def peer(seconds, factor=1.0):
    return Peer(lambda model, images: Slow(model, seconds, factor))


def raising(model, images):
    raise NotImplementedError("no kernel\nfor this")


@pytest.fixture
def rivals(monkeypatch, stand_in):
    """Every ViT takes 1 s, whether plain, ours or within another peer; that one takes what it adds."""
    planted = {
        "vitriton": PEERS["vitriton"],
        "plain": PEERS["plain"],
        "threefold": peer(2.0),
        "wrong": peer(-0.5, 1.01),
        "raises": Peer(raising),
        "absent": Peer(raising, ("no-such-package",)),
        "inference": Peer(PEERS["plain"].build, training=False),
    }
    for module in (models, run):
        monkeypatch.setattr(module, "PEERS", planted)
    for kind in (ViT, FusedViT):
        monkeypatch.setattr(kind, "forward", taking(1.0, kind.forward))


def bench(*args):
    return main(["bench", "--model", "xs", "--image-size", "64", "--dtype", "fp32", "--seconds", "0.01", *args])
