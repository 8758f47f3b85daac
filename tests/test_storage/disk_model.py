"""What POSIX lets a crash leave on a disk: a model of a file system that knows what was synced.

Data path: calls of storage.files.local -> `Recorder` -> log of operations -> `Disk` at any prefix of the log -> every
tree that may be found after a power loss there.

The rules, and nothing but these: content that was synced stays; of later content any part from the front is there, and
what follows is missing or zero. Entries of a directory (create, link, rename, unlink) made since its last sync are
each there or not, independent of one another and of the other side of a rename. A sync of a file says nothing about its
entry, and a sync of a directory nothing about its files. Real file systems keep more order than that.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from seam import Call

Tree = dict[str, bytes | None]  # content by name; None for a directory
Choose = Callable[[int], int]  # a number below the given one
Operation = tuple[Any, ...]  # name, then paths or content


@dataclass(eq=False)
class File:
    """Content in the cache, and how many bytes of it are synced."""

    content: bytes = b""
    synced: int = 0

    def survivor(self, choose: Choose) -> bytes:
        """One content that a crash may leave."""
        if self.synced == len(self.content):
            return self.content
        lost, zeros, part = self.content[: self.synced], len(self.content) - self.synced, choose(4)
        if part == 0:
            return self.content
        if part == 1:
            return lost
        if part == 2:
            return lost + bytes(zeros)
        kept = choose(zeros + 1)
        return self.content[: self.synced + kept] + bytes((zeros - kept) * choose(2))


@dataclass(eq=False)
class Folder:
    """Entries that are synced, and changes since: in order, None for a removal."""

    synced: dict[str, File | Folder] = field(default_factory=dict)
    pending: list[tuple[str, File | Folder | None]] = field(default_factory=list)

    def entries(self, keep: Callable[[], bool] = lambda: True) -> dict[str, File | Folder]:
        """Entries with those pending changes that `keep` keeps; by default what a living process sees."""
        found = dict(self.synced)
        for name, node in self.pending:
            if keep():
                if node is None:
                    found.pop(name, None)
                else:
                    found[name] = node
        return found


class Disk:
    """The file system below one directory, empty and synced at first. Paths are relative to it."""

    def __init__(self, tree: Tree | None = None) -> None:
        self.root = Folder()
        for path, content in (tree or {}).items():
            self.parent(path).synced[path.split("/")[-1]] = Folder() if content is None else File(content, len(content))

    def node(self, path: str) -> Any:
        """The file or folder of a path."""
        node: Any = self.root
        for name in path.split("/") if path != "." else []:
            node = node.entries()[name]
        return node

    def parent(self, path: str) -> Folder:
        """The folder that holds a path."""
        found: Folder = self.node(path.rpartition("/")[0] or ".")
        return found

    def _change(self, path: str, node: File | Folder | None) -> None:
        self.parent(path).pending.append((path.split("/")[-1], node))

    def apply(self, operation: Operation) -> None:
        """Do one operation of a log. Reports change nothing."""
        name, path, *rest = operation
        if name == "mkdir":
            self._change(path, Folder())
        elif name == "open":
            self._change(path, File())
        elif name == "write":
            self.node(path).content += rest[0]
        elif name == "fsync":
            node = self.node(path)
            if isinstance(node, File):
                node.synced = len(node.content)
            else:
                node.synced, node.pending = node.entries(), []
        elif name == "link":
            self._change(rest[0], self.node(path))
        elif name == "rename":
            node = self.node(path)
            self._change(path, None)
            self._change(rest[0], node)
        elif name in ("unlink", "rmtree"):
            self._change(path, None)

    def survivors(self, choose: Choose, *, random_tmp: bool) -> Tree:
        """One tree that a crash may leave.

        Args:
            choose: decides every open question.
            random_tmp: also what is left below `tmp/`; else that is as a living process sees it.
        """
        found: Tree = {}
        contents: dict[int, bytes] = {}  # a file with two names has one content

        def walk(folder: Folder, prefix: str, decide: Choose) -> None:
            for name, node in folder.entries(lambda: decide(2) == 0).items():  # in order of creation: names are random
                path = prefix + name
                if isinstance(node, Folder):
                    found[path] = None
                    temporary = path.split("/")[-1] == "tmp" and not random_tmp
                    walk(node, f"{path}/", _as_seen if temporary else decide)
                else:
                    if id(node) not in contents:
                        contents[id(node)] = node.survivor(decide)
                    found[path] = contents[id(node)]

        walk(self.root, "", choose)
        return found

    def alive(self) -> Tree:
        """What a living process sees."""
        return self.survivors(_as_seen, random_tmp=True)


def _as_seen(options: int) -> int:
    return 0


def exhaustive(disk: Disk, limit: int) -> tuple[list[Tree], bool]:
    """Every tree that a crash may leave outside of tmp/, and whether that is all of them: at most `limit` are made.

    Walks the tree of decisions: each run follows the tape, takes 0 beyond it, and the last decision that can be
    raised is raised next.
    """
    trees: list[Tree] = []
    tape: list[int] = []
    while len(trees) < limit:
        options: list[int] = []

        def choose(count: int, tape: list[int] = tape, options: list[int] = options) -> int:
            options.append(count)
            return tape[len(options) - 1] if len(options) <= len(tape) else 0

        trees.append(disk.survivors(choose, random_tmp=False))
        tape = tape + [0] * (len(options) - len(tape))
        while tape and tape[-1] + 1 >= options[len(tape) - 1]:
            tape.pop()
        if not tape:
            return trees, True
        tape[-1] += 1
    return trees, False


def sampled(disk: Disk, rng: random.Random, *, random_tmp: bool) -> Tree:
    """One tree at random: each crash draws how likely it is to keep things, so that extremes come often."""
    kept = rng.choice((0.0, 0.2, 0.5, 0.8, 0.95, 1.0))

    def choose(options: int) -> int:
        if options in (2, 4):
            return 0 if rng.random() < kept else rng.randrange(1, options)
        return rng.randrange(options)

    return disk.survivors(choose, random_tmp=random_tmp)


class Recorder:
    """A watcher that writes the log of what happens below `base`, and whatever is reported in between."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.log: list[Operation] = []

    def name(self, path: str | os.PathLike[str]) -> str:
        """A path relative to the base."""
        return Path(path).relative_to(self.base).as_posix()

    def __call__(self, call: Call) -> Any:
        if not Path(call.path).is_relative_to(self.base):
            return call.proceed()
        result = call.proceed()
        rest: tuple[Any, ...] = ()
        if call.function == "write":
            rest = (bytes(call.arguments[1][:result]),)
        elif call.function in ("link", "rename"):
            rest = (self.name(call.arguments[1]),)
        self.log.append((call.function, self.name(call.path), *rest))
        return result

    def report(self, name: str) -> None:
        """Note that the writer has told its caller that a file of the store is there to stay."""
        self.log.append(("report", name))


def write_tree(tree: Tree, base: Path) -> None:
    """Make a tree real below an existing directory."""
    for name, content in sorted(tree.items()):
        if content is None:
            (base / name).mkdir()
        else:
            (base / name).write_bytes(content)


def read_tree(base: Path) -> Tree:
    """Every file and directory below one."""
    return {
        path.relative_to(base).as_posix(): path.read_bytes() if path.is_file() else None
        for path in sorted(base.rglob("*"))
    }
