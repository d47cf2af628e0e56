"""record_attention(model): the attention maps of a model, fused or plain, while it runs.

A map is softmax(scale q kᵀ), before any dropout, one row a query. A fused block makes none: while somebody records, it
hands its q and k to `observe`, which computes the rows asked for and no others, in fp32 (fp64 from fp64). Of a plain
block, watch.py keeps what its own softmax gives, or computes the same from what scaled_dot_product_attention takes.

What a fused attention owes this file is one thing in its forward, right before its fused call:

    if record.active:
        record.observe(self, q, k, scale)

and that it steps aside, where it must, by `self.plain.forward(self, ...)`, which is then watched.
"""

import sys
import threading
from contextlib import ExitStack
from fnmatch import fnmatchcase

import torch
from torch import nn

from .tokens import cls_holder, tokens_of
from .watch import watch_calls, watched

__all__ = ["AttentionMaps", "attention_layers", "attention_map", "observe", "record_attention"]

active = False  # whether anybody records, in any thread; a bool, so that a compiled model has at most two forms
_recordings = []
_lock = threading.Lock()


def record_attention(model, *, layers=None, heads=None, rows=None, keep="last", detach=True, reduce=None):
    """A context in which the attention of `model` is recorded; it gives the AttentionMaps.

    layers  None for all, or one or a list of: index into attention_layers(model), name, shell pattern of names
    heads   None for all, or an index, a list of indices, a slice
    rows    None for all, or "cls", an index, a list of indices, a slice: of queries; only these rows are computed
    keep    "last": of each layer the map of its latest call; "all": those of every call, in order
    detach  False keeps the graph, to differentiate through the maps
    reduce  applied to each map (b, heads, rows, n) before it is kept: `lambda map: map.mean(1)`, `torch.Tensor.cpu`

    The model's outputs stay what they are. Recordings may be nested, each by a call of its own.
    Raises TypeError and ValueError for what cannot be, a model in which there is nothing to record among it.
    """
    return AttentionMaps(model, layers, heads, rows, keep, detach, reduce)


def observe(module, q, k, scale, mask=None):
    """Record softmax(scale q kᵀ + mask) of `module`, if somebody in this thread wants it.

    q (b, h, n, d) and k (b, h, m, d), any strides; mask broadcasts to (b, h, n, m): what is added to the scores, or
    bools, False where a query must not look. RuntimeError in torch.export, which would bake the recording in.
    """
    _observe(module, q, k, scale, mask)


def observe_qkv(module, qkv, heads, scale):
    """`observe` for a packed projection (b, n, 3 * heads * d), as `chunk(3, -1)` splits it."""
    q, k, _ = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    observe(module, q, k, scale)


def attention_map(q, k, scale, mask=None, *, heads=slice(None), rows=slice(None)):
    """softmax(scale q kᵀ + mask) in fp32 (fp64 from fp64), of some heads and rows of queries, and no others.

    q (b, h, n, d), k (b, h, m, d), mask as in `observe` -> (b, heads, rows, m); heads and rows are slices or lists of
    indices. A query that may look nowhere has a row of zeros.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    q, k = q[:, heads][:, :, rows], k[:, heads]
    with torch.autocast(q.device.type, enabled=False):
        scores = torch.matmul(q.to(dtype) * scale, k.to(dtype).transpose(-1, -2))
    if mask is None:
        return scores.softmax(dim=-1)
    mask = mask[(None,) * (4 - mask.ndim)]
    mask = mask if mask.shape[1] == 1 else mask[:, heads]
    mask = mask if mask.shape[2] == 1 else mask[:, :, rows]
    scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(dim=-1).masked_fill(scores.isneginf().all(dim=-1, keepdim=True), 0)


def attention_layers(model):
    """The names of the attention modules of `model`, in its order: those that record_attention's `layers` counts.

    They are the innermost modules that have "attention" in the name of their class, whatever library they are from.
    Raises TypeError if `model` is no nn.Module, ValueError if it has none.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; it must be a torch.nn.Module")
    named = [name for name, module in model.named_modules() if "attention" in type(module).__name__.lower()]
    inner = [name for name in named if not any(other != name and _below(other, name) for other in named)]
    if not inner:
        raise ValueError(
            f"nothing can be recorded in {type(model).__name__}: no module in it has a class with 'Attention' in its "
            "name, such as Attention or MultiheadAttention; it takes a Vision Transformer"
        )
    return inner


# ---------------------------------------------------------------------------------------------------------------------
# The recording


class AttentionMaps:
    """What record_attention gives: maps by layer, `maps[-1]` or `maps["blocks.3.attn"]`; `layers` are the names.

    Each is (b, heads, rows, n), fp32 or fp64. An index counts all layers of the model, recorded or not. Maps stay when
    the context ends. What counts are calls in the thread that opened it, but not those that a backward pass repeats
    (gradient checkpointing).
    """

    def __init__(self, model, layers=None, heads=None, rows=None, keep="last", detach=True, reduce=None):
        self._found = attention_layers(model)
        if keep not in ("last", "all"):
            raise ValueError(f"keep is {keep!r}: it must be 'last' (the latest call of a layer) or 'all'")
        self.layers = _chosen(layers, self._found)
        self._heads = _index(heads, "heads")
        self._rows = [_cls_row(model, self._found, self.layers)] if rows == "cls" else _index(rows, "rows")
        self._keep_all, self._detach, self._reduce = keep == "all", detach, reduce
        self._modules = _by_module(model, self._found, self.layers)
        self._attentions = [model.get_submodule(name) for name in self.layers]
        self._maps, self._failed = {name: [] for name in self.layers}, {}
        self._thread, self._hooks, self.watches = None, [], []

    def __enter__(self):
        global active, _observe
        if self._thread is not None:
            raise RuntimeError("a recording is opened once: call record_attention again for another")
        if _observe is _keep_in_all and "torch._dynamo" in sys.modules:
            why = "attention is recorded in eager calls; with fullgraph=True, record through the model not compiled"
            _observe = torch.compiler.disable(_keep_in_all, reason=why)
        self._thread = threading.get_ident()
        with _lock:
            _recordings.append(self)
            active = True
        for module in self._attentions:
            if _is_fused(module):
                vars(module)["plain"] = _Plain(type(module).plain)
            else:
                self._hooks += watch_calls(module, self)
        return self

    def __exit__(self, *_):
        global active
        for hook in self._hooks:
            hook.remove()
        with _lock:
            _recordings.remove(self)
            active = bool(_recordings)
            for module in self._attentions:
                if not any(module in other._modules for other in _recordings):
                    vars(module).pop("plain", None)
        self._modules, self._attentions = {}, []  # maps may outlive the model

    def all(self, layer):
        """The maps of every call of a layer, a list, oldest first; of the latest alone, unless keep="all"."""
        names = _chosen(layer, self._found)
        if len(names) > 1:
            raise KeyError(f"{layer!r} means several layers: {', '.join(names)}; choose one")
        (name,) = names
        if name not in self._maps:
            raise KeyError(f"{name} is not recorded here; recorded are {', '.join(self.layers)}")
        if name in self._failed:
            raise RuntimeError(f"there is no map of {name}: {self._failed[name]}")
        if not self._maps[name]:
            raise RuntimeError(
                f"there is no map of {name}: it was not called in this context and thread. Call the model inside the "
                "`with`; if it is compiled or exported, call the model that it was made from: only eager calls are "
                "recorded"
            )
        return self._maps[name]

    def __getitem__(self, layer):
        return self.all(layer)[-1]

    def __iter__(self):
        return iter(self.layers)

    def __len__(self):
        return len(self.layers)

    def items(self):
        """(name, map) of each layer."""
        return [(name, self[name]) for name in self.layers]

    def stack(self):
        """The maps of all layers in one tensor (b, layers, heads, rows, n). Raises ValueError where shapes differ."""
        maps = [map for _, map in self.items()]
        if len({map.shape for map in maps}) > 1:
            shapes = ", ".join(f"{name} {tuple(map.shape)}" for name, map in self.items())
            raise ValueError(f"the maps differ in shape, so they cannot be stacked: {shapes}; choose layers")
        return torch.stack(maps, dim=1)

    # for watch.py and for observe

    def hears(self):
        """Whether a call now counts: in this thread, and by no backward pass, which repeats checkpointed blocks."""
        return self._thread == threading.get_ident() and torch._C._current_graph_task_id() == -1

    def keep(self, module, q, k, scale, mask=None):
        """Compute the map of `module` from its q and k, and keep it."""
        self._check(self._modules[module], q.shape[1], q.shape[2])
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self._detach):
            self._add(module, attention_map(q, k, scale, mask, heads=self._heads, rows=self._rows))

    def keep_map(self, module, map):
        """Keep of a map (b, h, n, m) of all heads and rows, as a plain block made it, what is wanted."""
        self._check(self._modules[module], map.shape[1], map.shape[2])
        map = (map.detach() if self._detach else map)[:, self._heads][:, :, self._rows]
        # copied, as the block may write into its map, and as a few rows must not keep the whole alive
        self._add(module, map.to(torch.promote_types(map.dtype, torch.float32), copy=True))

    def fail(self, module, why):
        """There is no map of `module`, and this is why."""
        self._failed[self._modules[module]] = why

    def _add(self, module, map):
        maps = self._maps[self._modules[module]]
        if self._reduce is not None:
            map = self._reduce(map)
        if not self._keep_all:
            maps.clear()
        maps.append(map)

    def _check(self, name, heads, rows):
        for what, index, size in (("heads", self._heads, heads), ("rows", self._rows, rows)):
            if isinstance(index, list) and not all(-size <= i < size for i in index):
                raise IndexError(f"{what} are {index}, and {name} has {size} {what}: 0 to {size - 1}, or from the end")


def _keep_in_all(module, q, k, scale, mask=None):
    if torch.compiler.is_exporting():
        raise RuntimeError("attention is recorded in eager calls: end the recording before you export the model")
    for recording in _listening(module):
        for watch in recording.watches:
            if recording._modules.get(watch.module) == recording._modules[module]:
                watch.silent = True
        recording.keep(module, q, k, scale, mask)


_observe = _keep_in_all


def _listening(module):
    with _lock:
        return [recording for recording in _recordings if module in recording._modules and recording.hears()]


class _Plain:
    """Stands as `plain` in a fused module while somebody records: the plain class, its forward being watched."""

    def __init__(self, plain):
        self._plain = plain

    @property
    def forward(self):
        return _Watched(self._plain.forward)

    def __getattr__(self, name):
        return getattr(self._plain, name)

    def __reduce__(self):  # copied with its module
        return _Plain, (self._plain,)


class _Watched:
    def __init__(self, forward):
        self._forward = forward

    def __getattr__(self, name):
        return getattr(self._forward, name)

    def __call__(self, module, *args, **kwargs):
        with ExitStack() as stack:
            for recording in _listening(module):
                stack.enter_context(watched(module, recording, args, kwargs))
            return self._forward(module, *args, **kwargs)


# ---------------------------------------------------------------------------------------------------------------------
# Which layers, heads, rows


def _is_fused(module):
    return any("plain" in vars(cls) for cls in type(module).__mro__)


def _below(name, parent):
    return parent == "" or name == parent or name.startswith(parent + ".")


def _by_module(model, found, chosen):
    """{module: layer} of the chosen layers, and of the modules around just one: a fused block speaks for it."""
    modules = {}
    for name, module in model.named_modules():
        inside = [layer for layer in found if _below(layer, name)]
        if len(inside) == 1 and inside[0] in chosen:
            modules[module] = inside[0]
    return modules


def _chosen(layers, found):
    """The names among `found` that `layers` means, in the order of `found`."""
    if layers is None:
        return list(found)
    if isinstance(layers, slice):
        layers = found[layers]
    chosen = set()
    for layer in layers if isinstance(layers, (list, tuple, range)) else [layers]:
        if isinstance(layer, str):
            names = [name for name in found if name == layer] or [name for name in found if fnmatchcase(name, layer)]
        else:
            names = [found[layer]] if type(layer) is int and -len(found) <= layer < len(found) else []
        if not names:
            raise ValueError(
                f"there is no layer {layer!r}: the model has {len(found)} attention layers, to choose by index, name "
                f"or shell pattern: {', '.join(found)}"
            )
        chosen.update(names)
    if not chosen:
        raise ValueError("layers is empty: choose at least one, or None for all")
    return [name for name in found if name in chosen]


def _index(index, what):
    """A slice or a list of indices from what the user gave."""
    if index is None:
        return slice(None)
    if isinstance(index, slice):
        return index
    index = [index] if type(index) is int else index
    if isinstance(index, (list, tuple, range)) and index and all(type(i) is int for i in index):
        return list(index)
    allowed = "None, an index, a list of indices or a slice" + (", or 'cls'" if what == "rows" else "")
    raise ValueError(f"{what} is {index!r}: it must be {allowed}")


def _cls_row(model, found, layers):
    cls, tower = tokens_of(model).cls, cls_holder(model)
    if cls is None or tower is None:
        raise ValueError(
            f"rows is 'cls', and {type(model).__name__} has no CLS token: give rows=None, or the indices of the "
            "queries to record"
        )
    while not any(_below(layer, tower) for layer in found):  # from the embeddings up to the model that they are of
        tower = tower.rpartition(".")[0]
    if others := [layer for layer in layers if not _below(layer, tower)]:
        raise ValueError(
            f"rows is 'cls', and {others[0]} has no CLS token, which is {tower}'s: record that, or its layers"
        )
    return cls
