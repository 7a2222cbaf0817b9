"""Rows of a long experiment that are done, on disk: a rerun of the same call goes on from them.

A row's file is called by the hash of everything that decides the row. So a row is found only by a
call that would make the very same one, and a file is written in one step or not at all.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import ResultsError
from ..files import write_text
from ..results.fingerprint import weights_sha256

Identity = Mapping[str, Any]


@dataclass(frozen=True)
class KeptRows:
    """Where rows are kept until the result is saved.

    Attributes:
        folder: beside the folder the result will be saved in; None keeps nothing.
    """

    folder: Path | None

    @classmethod
    def beside(cls, out: str | Path | None) -> KeptRows:
        """Rows of a result that will be saved in `out` are kept in `out.partial`."""
        if out is None:
            return cls(None)
        place = Path(out).expanduser().absolute()
        return cls(place.with_name(f"{place.name}.partial"))

    def find(self, identity: Identity) -> dict[str, Any] | None:
        """The row that was kept for this, None if there is none that can be read."""
        path = self._path(identity)
        try:
            found = json.loads(path.read_text(encoding="utf-8")) if path else None
        except (OSError, ValueError):
            return None
        return found["row"] if isinstance(found, dict) and "row" in found else None

    def keep(self, identity: Identity, row: Mapping[str, Any]) -> None:
        """Write a row.

        Raises:
            ResultsError: if the folder cannot be written.
        """
        path = self._path(identity)
        if path is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ResultsError(
                f"cannot create {path.parent} ({error.strerror or error}): choose another folder"
            ) from None
        # Python's JSON keeps NaN and every digit; nobody else reads this file.
        write_text(path, json.dumps({"identity": identity, "row": row}))

    def forget(self, identities: Iterable[Identity]) -> None:
        """Remove rows that are saved elsewhere now, and the folder if nothing else is in it."""
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
        text = json.dumps(identity, sort_keys=True)
        return self.folder / f"row-{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"


def model_identity(source: Any) -> Any:
    """What tells a model source from another one without opening it, as JSON values.

    Objects by their weights; folders by name, size and time of their files; anything else is a
    name on a hub. Of a pair (model, tokenizer) both.
    """
    if isinstance(source, tuple) and len(source) == 2:
        return [model_identity(source[0]), repr(source[1]) if source[1] is not None else None]
    if isinstance(source, nn.Module):
        return {"weights": weights_sha256(source)}
    folder = Path(source).expanduser()
    if not folder.is_dir():
        return {"hub": str(source)}
    files = sorted((file.name, file.stat()) for file in folder.iterdir() if file.is_file())
    return {
        "folder": str(folder.resolve()),
        "files": [[name, stat.st_size, stat.st_mtime_ns] for name, stat in files],
    }
