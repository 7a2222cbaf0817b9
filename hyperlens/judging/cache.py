"""Answers of a judge by what was asked: in memory, and in a folder that outlives the run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ResultsError
from ..files import write_text


class Answers:
    """Answers of one judge. Each is a small file named by the hash of judge and prompt.

    A file that is damaged, or belongs to another question, counts as missing.

    Args:
        judge: who is asked, with all that its answers depend on; no secrets.
        folder: where answers are kept; made if missing. None keeps them in memory only.

    Raises:
        ResultsError: if the folder cannot be made.
    """

    def __init__(self, judge: Mapping[str, Any], folder: str | Path | None = None) -> None:
        self._judge = json.loads(json.dumps(judge))
        self._known: dict[str, str] = {}
        self.folder = None if folder is None else Path(folder).expanduser()
        self.damaged = 0
        if self.folder is None:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ResultsError(
                f"cannot keep answers in {self.folder} ({error.strerror or error}): choose another "
                "folder"
            ) from None

    def __len__(self) -> int:
        return len(self._known)

    def get(self, prompt: str) -> str | None:
        """The answer to a prompt, if there is one."""
        if prompt not in self._known and self.folder is not None:
            answer = self._read(self._file(self.folder, prompt), prompt)
            if answer is not None:
                self._known[prompt] = answer
        return self._known.get(prompt)

    def put(self, prompt: str, answer: str) -> None:
        """Keep an answer; on disk whole or not at all.

        Raises:
            ResultsError: if it cannot be written.
        """
        self._known[prompt] = answer
        if self.folder is not None:
            record = {"judge": self._judge, "prompt": prompt, "answer": answer}
            write_text(self._file(self.folder, prompt), json.dumps(record, indent=1) + "\n")

    def _file(self, folder: Path, prompt: str) -> Path:
        asked = json.dumps([self._judge, prompt], sort_keys=True)
        return folder / f"{hashlib.sha256(asked.encode()).hexdigest()}.json"

    def _read(self, file: Path, prompt: str) -> str | None:
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError):
            record = None
        if isinstance(record, dict):
            answer = record.get("answer")
            asked = (record.get("judge"), record.get("prompt"))
            if isinstance(answer, str) and asked == (self._judge, prompt):
                return answer
        self.damaged += 1
        return None
