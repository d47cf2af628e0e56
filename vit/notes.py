"""What fused blocks say while `explain` listens: which of their calls did not take the fused way, and why.

A fused block asks at each call whether anything stands between it and its plain form: a hook, a mask, dropout of
attention weights, a Linear that somebody replaced. Where it does, the block does what its plain form would have done,
and calls `note`.
"""

__all__ = ["NOT_MERGED", "listening", "note"]

NOT_MERGED = "its LayerNorm and its first Linear are not both plain and without a hook, so they are called one by one"

_heard = None  # while somebody listens: [(module, reason), ...] in the order of the calls


def note(module, reason):
    """Say that this call of `module` goes the plain way, because of `reason`."""
    if _heard is not None:
        _heard.append((module, reason))


class listening:
    """A context that gives the list of what is noted within it, (module, reason) each."""

    def __enter__(self):
        global _heard
        self.outer, _heard = _heard, []
        return _heard

    def __exit__(self, *_):
        global _heard
        _heard = self.outer
