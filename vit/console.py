"""What the subcommands of `vitriton` share: text for people, JSON for programs, and errors that end a command."""

import importlib.util
import json
import os
import sys
from contextlib import contextmanager
from importlib import metadata
from itertools import chain
from pathlib import Path

__all__ = ["Console", "Problem", "check_writable", "progress_bar", "require", "version"]


class Problem(Exception):
    """What keeps a command from doing its work, in words that say what to do about it. The exit code is 2."""


class Console:
    """Where a command writes. `json_file` is None, a path, or "-" for stdout: then the text goes to stderr.

    A `silent` one writes nothing: of several processes with the same task one speaks.
    """

    def __init__(self, json_file=None, silent=False):
        self.json_file = None if silent else json_file
        self.stream = sys.stderr if json_file == "-" else sys.stdout
        if silent:
            self.stream = open(os.devnull, "w")  # noqa: SIM115
            return
        if json_file not in (None, "-"):
            check_writable(json_file, "--json")

    def say(self, text=""):
        print(text, file=self.stream, flush=True)

    def table(self, header, rows, widths=None):
        """Print a table of strings, the first column to the left and the others to the right. With `widths` (those of
        the header are the least), each row is printed as soon as `rows` yields it."""
        if widths is None:
            rows = list(rows)
            widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        widths = [max(len(name), width) for name, width in zip(header, widths, strict=True)]
        for row in chain([header, ["-" * width for width in widths]], rows):
            first, *others = row
            cells = [first.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(others, widths[1:], strict=True))]
            self.say(("  " + "  ".join(cells)).rstrip())

    def finish(self, command, ok, seconds, **record):
        """Write the JSON record, if one was asked for, and return the exit code: 0, or 1 if not `ok`."""
        record = {"command": command, "version": version(), "ok": bool(ok), "seconds": round(seconds, 1)} | record
        if self.json_file == "-":
            print(json.dumps(record, indent=2))
        elif self.json_file is not None:
            Path(self.json_file).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
            self.say(f"wrote {self.json_file}")
        return 0 if ok else 1


@contextmanager
def progress_bar(console, what, *, lines=10, transient=False):
    """Yields show(done in [0, 1], what was just done or None): a bar on a terminal, else at most so many lines.

    What the console is to say meanwhile goes above the bar.
    """
    if console.stream.isatty() and importlib.util.find_spec("rich") is not None:
        from rich.console import Console as Terminal
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn(f"  {what}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
        )
        with Progress(*columns, console=Terminal(file=console.stream), transient=transient) as progress:
            task = progress.add_task("", total=1.0)
            console.say = lambda text="": progress.console.out(text, highlight=False)
            try:
                yield lambda done, what: progress.update(task, completed=done, description=what)
            finally:
                del console.say
    else:
        said = 0

        def show(done, what):
            nonlocal said
            if what is not None and int(lines * done + 1e-9) > said:
                said = int(lines * done + 1e-9)
                console.say(f"  {min(done, 1):4.0%}  {what}")

        yield show


def version():
    """The version of vitriton that is installed; "unknown" where it is only on the path."""
    try:
        return metadata.version("vitriton")
    except metadata.PackageNotFoundError:
        return "unknown"


def require(extra, *packages):
    """Raise Problem, naming the extra to install, if one of `packages` ({import name: distribution}) is missing."""
    missing = [name for module, name in packages if importlib.util.find_spec(module) is None]
    if missing:
        raise Problem(f"needs {', '.join(missing)}, which cannot be imported here: pip install 'vitriton[{extra}]'")


def check_writable(path, option):
    """Raise Problem if the file `path`, given as `option`, cannot be written. An existing file keeps its content."""
    existed = os.path.lexists(path)
    try:
        with open(path, "ab"):
            pass
    except OSError as error:
        raise Problem(f"cannot write {option} {path}: {error.strerror}; give another file to {option}") from error
    if not existed:
        os.remove(path)
