"""record_attention(model): the attention maps of a model, fused or plain, while it runs.

A map is softmax(scale q kᵀ), before any dropout, one row a query. A fused block makes none: while somebody records, it
hands its q and k to `observe`, which computes the rows asked for and nothing else, in fp32 (fp64 from fp64). In a plain
block of any library, the softmax or scaled_dot_product_attention that it calls is watched.

What a fused attention owes this file, in its forward, right before its fused call:

    if record.active:
        record.observe(self, q, k, scale)

and, where it steps aside for its plain forward: `record.watched(self)` around it, if `record.active`.
"""

import threading
from fnmatch import fnmatchcase

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

__all__ = ["AttentionMaps", "attention_layers", "observe", "record_attention", "watched"]

active = False  # whether anybody records, in any thread: a bool, so that a compiled model is compiled at most twice
_recordings = []
_lock = threading.Lock()


def record_attention(model, *, layers=None, heads=None, rows=None, keep="last", detach=True, reduce=None):
    """A context in which the attention of `model` is recorded; gives the AttentionMaps.

    layers  None for all, or one or a list of: index into attention_layers(model), name, shell pattern of names
    heads   None for all, or an index, a list of indices, a slice
    rows    None for all, or "cls", an index, a list of indices, a slice: of queries; only these rows are computed
    keep    "last": of each layer the map of its latest call; "all": of every call, in order
    detach  False keeps the graph, to differentiate through the maps
    reduce  applied to each map (b, heads, rows, n) before it is kept, such as `lambda map: map.mean(1)`

    Raises TypeError and ValueError for what cannot be, a model in which there is nothing to record among it.
    """
    return AttentionMaps(model, layers, heads, rows, keep, detach, reduce)


def observe(module, q, k, scale, mask=None):
    """Record softmax(scale q kᵀ + mask) of `module`, if somebody in this thread wants it.

    q (b, h, n, d) and k (b, h, m, d), any strides; mask broadcasts to (b, h, n, m): what is added to the scores, or
    bools, False where a query must not look.
    """
    for recording in _listening(module):
        recording._keep(module, q, k, scale, mask)


def observe_qkv(module, qkv, heads, scale):
    """`observe` for a packed projection (b, n, 3 * heads * d), as `chunk(3, -1)` splits it."""
    q, k, _ = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    observe(module, q, k, scale)


def watched(module):
    """A context for the plain forward of `module`, one that is fused: the softmax that it calls is recorded."""
    return _Watch(module, _listening(module))


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
    mask = mask.expand(*(1,) * (4 - mask.ndim), *mask.shape)
    mask = mask if mask.shape[1] == 1 else mask[:, heads]
    mask = mask if mask.shape[2] == 1 else mask[:, :, rows]
    scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(dim=-1).masked_fill(scores.isneginf().all(dim=-1, keepdim=True), 0)


# ---------------------------------------------------------------------------------------------------------------------
# The recording


class AttentionMaps:
    """What record_attention gives: maps by layer, as `maps[-1]`, `maps["blocks.3.attn"]`, in the order of the model.

    Each is (b, heads, rows, n) in fp32. Maps stay when the context ends. Only calls in the thread that opened it count,
    and none that a backward pass makes again (gradient checkpointing).
    """

    def __init__(self, model, layers=None, heads=None, rows=None, keep="last", detach=True, reduce=None):
        found = attention_layers(model)
        if keep not in ("last", "all"):
            raise ValueError(f"keep is {keep!r}: it must be 'last' (the latest call of a layer) or 'all'")
        self.layers = _chosen(layers, found, model)
        self._heads = _index(heads, "heads")
        self._rows = [_cls_row(model, self.layers)] if rows == "cls" else _index(rows, "rows")
        self._keep_all, self._detach, self._reduce = keep == "all", detach, reduce
        self._found, self._maps, self._failed = found, {name: [] for name in self.layers}, {}
        self._modules = _by_module(model, found, self.layers)
        self._hooks, self._thread = [], None

    def __enter__(self):
        if self._thread is not None:
            raise RuntimeError("this recording is open already: call record_attention again for another")
        self._thread = threading.get_ident()
        for module in self._modules:
            if not is_fused(module):
                self._hooks += _watch_plain(module, self)
        _change(_recordings.append, self)
        return self

    def __exit__(self, *_):
        _change(_recordings.remove, self)
        self._thread = None
        while self._hooks:
            self._hooks.pop().remove()

    def all(self, layer):
        """The maps of every call of a layer, a list, oldest first; of the latest alone, with keep="last"."""
        name = self._name(layer)
        if name in self._failed:
            raise RuntimeError(f"no map of {name}: {self._failed[name]}")
        if not self._maps[name]:
            raise RuntimeError(
                f"no map of {name}: it was not called in this context and thread. Call the model inside the `with`; "
                "if it is compiled or exported, call the one that it was made from: recording is for eager calls"
            )
        return self._maps[name]

    def __getitem__(self, layer):
        return self.all(layer)[-1]

    def __iter__(self):
        return iter(self.layers)

    def __len__(self):
        return len(self.layers)

    def keys(self):
        return self.layers

    def items(self):
        """(name, map) of each layer."""
        return [(name, self[name]) for name in self.layers]

    def stack(self):
        """The maps of all layers in one tensor (b, layers, heads, rows, n). Raises ValueError where shapes differ."""
        maps = [self[name] for name in self.layers]
        if len({map.shape for map in maps}) > 1:
            shapes = ", ".join(f"{name} {tuple(map.shape)}" for name, map in self.items())
            raise ValueError(f"the maps have different shapes, so they cannot be stacked: {shapes}; choose layers")
        return torch.stack(maps, dim=1)

    def _name(self, layer):
        (name, *others) = _chosen(layer, self._found, None)
        if others:
            raise KeyError(f"{layer!r} are several layers: {', '.join((name, *others))}; choose one")
        if name not in self._maps:
            raise KeyError(f"{name} is not recorded here; recorded are {', '.join(self.layers)}")
        return name

    def _keep(self, module, q, k, scale, mask=None):
        """Compute and keep the map of `module` from its q and k."""
        if self._detach:
            q, k = q.detach(), k.detach()
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self._detach):
            self._check(self._modules[module], q.shape[1], q.shape[2])
            self._add(module, attention_map(q, k, scale, mask, heads=self._heads, rows=self._rows))

    def _keep_map(self, module, map):
        """Keep what a plain block made: a map (b, h, n, m) of all heads and rows."""
        self._check(self._modules[module], map.shape[1], map.shape[2])
        map = (map.detach() if self._detach else map)[:, self._heads][:, :, self._rows]
        # a copy, as the block may go on to write into its map, and a part must not keep the whole alive
        map = map.to(torch.promote_types(map.dtype, torch.float32), copy=True, memory_format=torch.contiguous_format)
        self._add(module, map)

    def _add(self, module, map):
        name = self._modules[module]
        if self._reduce is not None:
            map = self._reduce(map)
        if not self._keep_all:
            self._maps[name].clear()
        self._maps[name].append(map)

    def _fail(self, module, why):
        self._failed[self._modules[module]] = why

    def _check(self, name, heads, rows):
        for what, index, size in (("heads", self._heads, heads), ("rows", self._rows, rows)):
            if isinstance(index, list) and not all(-size <= i < size for i in index):
                raise IndexError(f"{what} are {index}: {name} has {size} {what}, so an index is in [{-size}, {size})")


def _change(change, recording):
    global active
    with _lock:
        change(recording)
        active = bool(_recordings)


def _listening(module):
    """The recordings of this thread that want `module`."""
    if torch._C._current_graph_task_id() != -1:  # in a backward pass: a checkpointed block runs again
        return []
    thread = threading.get_ident()
    with _lock:
        return [r for r in _recordings if r._thread == thread and module in r._modules]


# ---------------------------------------------------------------------------------------------------------------------
# Which layers, heads, rows


def attention_layers(model):
    """The names of the attention modules of `model`, in its order: those that record_attention's `layers` counts.

    They are the innermost modules whose class is a MultiheadAttention or has "attention" in its name, whatever library
    they are from. Raises TypeError if `model` is no nn.Module, ValueError if it has none.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; it must be a torch.nn.Module")
    named = {name: module for name, module in model.named_modules() if "attention" in type(module).__name__.lower()}
    inner = [name for name in named if not any(other != name and _below(other, name) for other in named)]
    if not inner:
        raise ValueError(
            f"nothing can be recorded in {type(model).__name__}: it has no module whose class is a MultiheadAttention "
            "or has 'attention' in its name; pass the Vision Transformer itself"
        )
    return inner


def is_fused(module):
    """Whether `module` is a fused block, which hands its q and k over by itself."""
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
        elif name in chosen:
            modules[module] = name
    return modules


def _chosen(layers, found, model):
    """The names among `found` that `layers` means, in the order of `found`."""
    if layers is None:
        return list(found)
    if isinstance(layers, slice):
        return found[layers]
    chosen = set()
    for layer in layers if isinstance(layers, (list, tuple, range)) else [layers]:
        if isinstance(layer, str):
            names = [name for name in found if name == layer or fnmatchcase(name, layer)]
        elif isinstance(layer, int) and -len(found) <= layer < len(found):
            names = [found[layer]]
        else:
            names = []
        if not names:
            raise ValueError(
                f"there is no layer {layer!r}: the model has {len(found)} attention layers, to be chosen by index, "
                f"name or shell pattern: {', '.join(found)}"
            )
        chosen.update(names)
    return [name for name in found if name in chosen]


def _index(index, what):
    """A slice or a list of indices from what the user gave."""
    if index is None:
        return slice(None)
    if isinstance(index, slice):
        return index
    index = [index] if isinstance(index, int) else index
    if isinstance(index, (list, tuple, range)) and index and all(type(i) is int for i in index):
        return list(index)
    allowed = "None, an index, a list of indices or a slice" + (", or 'cls'" if what == "rows" else "")
    raise ValueError(f"{what} is {index!r}: it must be {allowed}")


def _cls_row(model, layers):
    names = ("cls_token", "class_token", "class_embedding")
    for module in model.modules():
        for name in names:
            token = getattr(module, name, None)
            if isinstance(token, Tensor) and token.numel():
                return 0
    raise ValueError(
        f"rows='cls', and {type(model).__name__} has no CLS token (looked for {', '.join(names)}): give rows=None or "
        "the indices of the queries to record"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Plain blocks

SOFTMAX = (F.softmax, torch.softmax, Tensor.softmax, torch.special.softmax)


class _Watch(TorchFunctionMode):
    """While it is on, the softmax or scaled_dot_product_attention that is called is the map of `module`."""

    def __init__(self, module, recordings):
        super().__init__()
        self.module, self.recordings, self.seen = module, recordings, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func in SOFTMAX and out.ndim == 4:
            self.seen += 1
            for recording in self.recordings:
                recording._keep_map(self.module, out)
        elif func is F.scaled_dot_product_attention:
            self.seen += 1
            for recording in self.recordings:
                recording._keep(self.module, *_as_observed(*args, **kwargs))
        return out

    def __exit__(self, kind, *rest):
        if kind is None and self.seen != 1:
            why = "calls neither softmax nor scaled_dot_product_attention on (batch, heads, tokens, dim)"
            why = why if not self.seen else f"makes {self.seen} maps in one call"
            for recording in self.recordings:
                recording._fail(self.module, f"{type(self.module).__name__} {why}")
        return super().__exit__(kind, *rest)


def _as_observed(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """q, k, scale and mask, from the arguments of scaled_dot_product_attention."""
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], dim=-3)
    if is_causal:
        attn_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    return query, key, query.shape[-1] ** -0.5 if scale is None else scale, attn_mask


def _watch_plain(module, recording):
    """Hooks on a plain attention module, by which its calls are watched."""
    if "attention" not in type(module).__name__.lower():
        return []
    open_watches = []

    def before(module, args):
        if _listening(module):
            open_watches.append(_Watch(module, [recording]))
            open_watches[-1].__enter__()

    def after(module, args, out):
        if open_watches:
            open_watches.pop().__exit__(None, None, None)

    return [module.register_forward_pre_hook(before), module.register_forward_hook(after, always_call=True)]
