"""A bug to plant in the kernels, and the test that must then fail: what the tables planted_in_*.py are of.

test_planted_bugs.py plants them one at a time.

Each is a mistake that somebody could make tomorrow, and many of them have been made in libraries like this one. `text`
stands exactly once in the file, in the function that `within` names if it is given (a piece of text that begins it).
"""

from dataclasses import dataclass

__all__ = ["Bug", "Stale"]


class Stale(AssertionError):
    """The table no longer fits the source."""


@dataclass(frozen=True)
class Bug:
    """`text` of kernels/`file` becomes `instead`; `why` it matters; `killed_by` the tests, as pytest takes them."""

    name: str
    file: str
    text: str
    instead: str
    why: str
    killed_by: str
    within: str = ""
    quick: bool = False  # planted in every run of the tests, not with `-m slow` only

    def plant(self, source):
        """The source with the bug; raises Stale where `text` does not stand there exactly once."""
        start, end = 0, len(source)
        if self.within:
            if source.count(self.within) != 1:
                raise Stale(f"{self.name}: kernels/{self.file} has {self.within!r} {source.count(self.within)} times")
            start = source.index(self.within)
            end = source.find("\n\n\n", start) % (len(source) + 1)
        found = source.count(self.text, start, end)
        if found != 1:
            raise Stale(
                f"{self.name}: {self.text!r} stands {found} times in {self.within or 'kernels/' + self.file}; it must "
                "stand there once: change it in tests/planted_in_*.py as the code changed"
            )
        at = source.index(self.text, start, end)
        return source[:at] + self.instead + source[at + len(self.text) :]
