"""What was noticed about files that are read all the same: counted, so that it is told once and not for every file."""

from collections.abc import Callable


class Notes(dict):
    """Text of a note -> (how often, the first file). What is counted (files, pixels) is part of the text."""

    def add(self, text: str, path: str, count: int = 1) -> None:
        before, first = self.get(text, (0, path))
        self[text] = before + count, first

    def merge(self, others: "Notes") -> None:
        for text, (count, path) in others.items():
            self.add(text, path, count)

    def lines(self) -> list[str]:
        """One line for each text: how often, what, and the first file."""
        return [f"{count} {text} (first {path})" for text, (count, path) in self.items()]


def tell_new(known: Notes, found: Notes, log: Callable[[str], None] | None) -> None:
    """Merges `found` into `known`, and logs the texts that were not among them."""
    for text, (_, path) in found.items():
        if text not in known and log is not None:
            log(f"note: {path}: {text}")
    known.merge(found)
