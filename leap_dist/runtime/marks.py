"""What a run was made with, part by part, so that a resumed one is made with the same.

A teacher's blocks are read as the curriculum comes to them, so what is known of its weights grows: a part is marked
when it is first read. What a checkpoint knows is compared with what is known by then, and with the rest as it is read.
"""

from __future__ import annotations

from collections.abc import Mapping

from leap_dist.errors import UserError


class Marks:
    """A few letters for every part that was read.

    whose: the option that names the source, for the messages. found: mark of every part, by its name.
    """

    def __init__(self, whose: str) -> None:
        self.found: dict[str, str] = {}
        self._whose = whose
        self._expected: dict[str, str] = {}
        self._holder = ""

    def note(self, part: str, mark: str) -> None:
        """Take note of a part that has been read.

        Raises:
            UserError: it is not what the checkpoint was made with.
        """
        self.found[part] = mark
        expected = self._expected.get(part, mark)
        if expected != mark:
            raise UserError(
                f"checkpoint {self._holder}: saved with teacher={expected} ({part}), this run has teacher={mark}; "
                f"{self._whose} holds other weights than that run had"
            )

    def expect(self, marks: Mapping[str, str], holder: object) -> None:
        """Compare with the marks that `holder`, a checkpoint, was made with, now and from now on.

        Raises:
            UserError: as `note`.
        """
        self._expected, self._holder = dict(marks), str(holder)
        for part, mark in list(self.found.items()):
            self.note(part, mark)
