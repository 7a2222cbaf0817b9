"""Ask a judge until its answers can be read, and never the same thing twice.

Every answer is kept, in memory and in a folder that outlives the run, by what was asked.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..errors import JudgeError, ResultsError
from ..files import write_text
from .judges import Judge
from .prompt import Judgement, UnreadableAnswer, ask_again, read_judgement


def ask(
    judge: Judge,
    prompts: Sequence[str],
    answers: AnswerCache,
    *,
    tries: int,
    progress: bool,
    read: Callable[[str], Judgement] = read_judgement,
) -> dict[str, Judgement | UnreadableAnswer]:
    """The judgement on every prompt, or what was wrong with the last answer to it.

    After an answer that cannot be read, the prompt is sent again together with what was wrong, up
    to `tries` times in all. Each answer is kept as soon as it arrives, so that an interrupted run
    can be resumed.

    Args:
        judge: whom to ask.
        prompts: equal ones are sent once.
        answers: those known already; new ones are added.
        tries: how often to ask at most, the first time included.
        progress: show progress bars.
        read: the judgement in an answer; it raises UnreadableAnswer where there is none.

    Raises:
        JudgeError: if the judge refuses, or fails too often.
        ResultsError: if an answer cannot be kept.
    """
    judgements: dict[str, Judgement | UnreadableAnswer] = {}
    wordings = {prompt: prompt for prompt in prompts}
    for attempt in range(tries):
        _get_answers(judge, list(wordings.values()), answers, attempt, progress)
        unread = {}
        for prompt, wording in wordings.items():
            try:
                judgements[prompt] = read(answers.get(wording) or "")
            except UnreadableAnswer as problem:
                judgements[prompt] = problem
                unread[prompt] = ask_again(prompt, str(problem))
        wordings = unread
    return judgements


def _get_answers(
    judge: Judge, prompts: list[str], answers: AnswerCache, attempt: int, progress: bool
) -> None:
    missing = [prompt for prompt in prompts if answers.get(prompt) is None]
    label = "asking again" if attempt else "judging"
    bar = tqdm(total=len(prompts), desc=label, unit="answer", disable=not progress, leave=False)
    try:
        with bar, closing(judge.answers(missing)) as arriving:
            bar.update(len(prompts) - len(missing))
            for index, answer in arriving:
                answers.put(missing[index], answer)
                bar.update()
    except JudgeError as error:
        if answers.folder is None:
            raise
        raise JudgeError(
            f"{error}; {len(answers)} answers are kept in {answers.folder}: the same call resumes "
            "from there"
        ) from None
    silent = sum(answers.get(prompt) is None for prompt in missing)
    if silent:
        raise JudgeError(f"the judge left {silent} of {len(missing)} prompts without an answer")


class AnswerCache:
    """Answers of one judge, each in a small file named by the hash of judge and prompt.

    A file that is damaged, or belongs to another question, counts as missing.

    Args:
        judge: its identity, which is all that its answers depend on; no secrets.
        folder: where answers are kept; made if missing. None keeps them in memory only.

    Attributes:
        damaged: how many files could not be used.

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
        """Keep an answer; its file appears whole or not at all.

        Raises:
            ResultsError: if it cannot be written.
        """
        self._known[prompt] = answer
        if self.folder is not None:
            record = {"judge": self._judge, "prompt": prompt, "answer": answer}
            write_text(self._file(self.folder, prompt), json.dumps(record, indent=1) + "\n")

    def _file(self, folder: Path, prompt: str) -> Path:
        key = json.dumps([self._judge, prompt], sort_keys=True)
        return folder / f"{hashlib.sha256(key.encode()).hexdigest()}.json"

    def _read(self, file: Path, prompt: str) -> str | None:
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError):
            record = None
        if isinstance(record, dict):
            answer = record.get("answer")
            key = (record.get("judge"), record.get("prompt"))
            if isinstance(answer, str) and key == (self._judge, prompt):
                return answer
        self.damaged += 1
        return None
