"""Long work goes on where it stopped: what is done is on disk, found again by what decides it.

There are two forms. `KeptRecords` holds JSON records in files named by the hash of everything that
decides them: a record is found only by a call that would make the very same one. `WorkFolder` holds
whole results under names that people read, in a folder that is stamped with everything that decides
all of them: other work is refused there.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

from torch import nn

from ..errors import ResultsError
from ..files import check_new_folder, expand_user, partial_folder, write_text
from .fingerprint import weights_sha256

Identity = Mapping[str, Any]
"""Everything that decides a record, as JSON values: models, texts, options, versions."""


def digest_of(identity: Identity) -> str:
    """What a file is called that is found again by everything that decides it.

    >>> digest_of({"seed": 0, "texts": "a"}) == digest_of({"texts": "a", "seed": 0})
    True
    """
    text = json.dumps(identity, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@dataclass(frozen=True)
class KeptRecords:
    """JSON records that are done, one file each; written in one step or not at all.

    Attributes:
        folder: made when the first record is kept; None keeps nothing.
    """

    folder: Path | None

    @classmethod
    def beside(cls, out: str | Path | None) -> KeptRecords:
        """Records of a result that will be saved in `out` are kept in `out.partial`."""
        if out is None:
            return cls(None)
        return cls(partial_folder(out))

    def find(self, identity: Identity) -> dict[str, Any] | None:
        """The record that was kept for this identity; None if no file holds it."""
        path = self._path(identity)
        try:
            data = json.loads(path.read_text(encoding="utf-8")) if path else None
        except (OSError, ValueError, RecursionError):
            return None
        if not isinstance(data, dict) or data.get("identity") != _as_read_back(identity):
            return None
        record = data.get("record")
        return record if isinstance(record, dict) else None

    def keep(self, identity: Identity, record: Mapping[str, Any]) -> None:
        """Write a record.

        Args:
            identity: everything that decides it, as JSON values.
            record: JSON values; NaN is kept.

        Raises:
            ResultsError: if the folder cannot be written.
        """
        path = self._path(identity)
        if path is None:
            return
        make_folder(path.parent)
        # Python's JSON keeps NaN and every digit; nobody else reads this file.
        write_text(path, json.dumps({"identity": identity, "record": record}))

    def forget(self, identities: Iterable[Identity]) -> None:
        """Remove records that are saved elsewhere now, and the folder if nothing else is in it."""
        if self.folder is None:
            return
        with suppress(OSError):
            for identity in identities:
                path = self._path(identity)
                if path is not None:
                    path.unlink(missing_ok=True)
            self.folder.rmdir()

    def _path(self, identity: Identity) -> Path | None:
        if self.folder is None:
            return None
        return self.folder / f"{digest_of(identity)}.json"


def _as_read_back(identity: Identity) -> Any:
    """Tuples are lists after a round trip through JSON."""
    return json.loads(json.dumps(identity))


@runtime_checkable
class Saves(Protocol):
    """What every result can do."""

    def save(self, folder: str | Path) -> Path:
        """Write into a new folder."""


AnyResult = TypeVar("AnyResult", bound=Saves)


@dataclass(frozen=True)
class WorkFolder:
    """A folder for work in parts: a new one, or the one that the same work began.

    Attributes:
        folder: made if it does not exist.
        stamp_name: the file in it that holds the stamp.
        stamp: everything that decides the results, as JSON values; one is `hyperlens`, the version.
        what: the work, for messages, such as "a demo".
    """

    folder: Path
    stamp_name: str
    stamp: Mapping[str, Any]
    what: str

    def part(
        self, name: str, load: Callable[[Path], AnyResult], make: Callable[[], AnyResult]
    ) -> AnyResult:
        """The result of one part: loaded if it is there, else made and saved.

        Args:
            name: of the part's folder, relative to the folder.
            load: reads a saved result.
            make: makes it.

        Raises:
            ResultsError: if the folder holds something else, or cannot be written.
        """
        place = self.folder / name
        if not place.is_dir():
            result = make()
            # Only now, so that a call that fails leaves the folder to the corrected one.
            self.claim()
            result.save(place)
        return load(place)

    def check(self) -> bool:
        """Refuse early a folder that `claim` would refuse; writes nothing.

        Returns:
            Whether the folder bears the stamp already.

        Raises:
            ResultsError: if the folder holds something else, or cannot be written.
        """
        folder = self.folder
        try:
            if not os.path.lexists(folder):
                check_new_folder(folder)
                return False
            names = {file.name for file in folder.iterdir()}
            if not names:
                return False
            if self.stamp_name not in names:
                raise ResultsError(
                    f"{folder} is not empty and not {self.what}: choose a new folder"
                )
            text = (folder / self.stamp_name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ResultsError(f"cannot use {folder} ({reason}): choose another folder") from None
        same = text == self._stamp_text()
        # A stamp with nothing beside it is of work that came to nothing: a mistyped command, say.
        if not same and not (names == {self.stamp_name} and _is_stamp(text)):
            raise ResultsError(
                f"{folder} is {self.what} of another version of hyperlens or with other inputs: "
                "choose a new folder"
            )
        return same

    def claim(self) -> None:
        """Make and stamp the folder, unless it bears the stamp already.

        Raises:
            ResultsError: if the folder holds something else, or cannot be written.
        """
        if self.check():
            return
        make_folder(self.folder)
        write_text(self.folder / self.stamp_name, self._stamp_text())

    def _stamp_text(self) -> str:
        return json.dumps(self.stamp, indent=1) + "\n"


def _is_stamp(text: str) -> bool:
    try:
        stamp = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(stamp, dict) and "hyperlens" in stamp


def make_folder(folder: Path) -> None:
    """Make a folder unless it is there.

    Raises:
        ResultsError: if it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResultsError(
            f"cannot use {folder} ({error.strerror or error}): choose another folder"
        ) from None


def source_identity(source: Any) -> Any:
    """What tells a model source from another one without opening it, as JSON values.

    Objects by their weights; folders by name, size and time of their files; anything else is a
    name on a hub. Of a pair (model, tokenizer) both.

    >>> source_identity("owner/model")
    {'hub': 'owner/model'}
    """
    if isinstance(source, tuple) and len(source) == 2:
        return [source_identity(source[0]), repr(source[1]) if source[1] is not None else None]
    if isinstance(source, nn.Module):
        return {"weights": weights_sha256(source)}
    folder = expand_user(source)
    if not folder.is_dir():
        return {"hub": str(source)}
    files = sorted((file.name, file.stat()) for file in folder.iterdir() if file.is_file())
    return {
        "folder": str(folder.resolve()),
        "files": [[name, stat.st_size, stat.st_mtime_ns] for name, stat in files],
    }
