"""Ask a judge until its answers can be read, and never the same thing twice."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing

from tqdm.auto import tqdm

from ..errors import JudgeError
from .cache import Answers
from .judges import Judge
from .prompt import ask_again
from .verdict import NoVerdict, Verdict, read_verdict

Found = Verdict | NoVerdict


def ask(
    judge: Judge, prompts: Sequence[str], answers: Answers, *, tries: int, progress: bool
) -> dict[str, Found]:
    """The verdict on every prompt, or what was wrong with the last answer to it.

    An answer that cannot be read is answered with the same prompt and what was wrong, `tries`
    times in all. Every answer is kept as soon as it is there, so what was interrupted goes on.

    Args:
        judge: whom to ask.
        prompts: the same one twice is asked once.
        answers: those that there are, and where new ones go.
        tries: how often to ask at most, the first time included.
        progress: show progress bars.

    Raises:
        JudgeError: if the judge refuses, or fails too often.
        ResultsError: if an answer cannot be kept.
    """
    found: dict[str, Found] = {}
    wordings = {prompt: prompt for prompt in prompts}
    for attempt in range(tries):
        _get_answers(judge, list(wordings.values()), answers, attempt, progress)
        unread = {}
        for prompt, wording in wordings.items():
            try:
                found[prompt] = read_verdict(answers.get(wording) or "")
            except NoVerdict as problem:
                found[prompt] = problem
                unread[prompt] = ask_again(prompt, str(problem))
        wordings = unread
    return found


def _get_answers(
    judge: Judge, prompts: list[str], answers: Answers, attempt: int, progress: bool
) -> None:
    missing = [prompt for prompt in prompts if answers.get(prompt) is None]
    what = "asking again" if attempt else "judging"
    bar = tqdm(total=len(prompts), desc=what, unit="answer", disable=not progress, leave=False)
    try:
        with bar, closing(judge.answers(missing)) as coming:
            bar.update(len(prompts) - len(missing))
            for index, answer in coming:
                answers.put(missing[index], answer)
                bar.update()
    except JudgeError as error:
        if answers.folder is None:
            raise
        raise JudgeError(
            f"{error}; {len(answers)} answers are kept in {answers.folder}, from which the same "
            "call goes on"
        ) from None
    silent = sum(answers.get(prompt) is None for prompt in missing)
    if silent:
        raise JudgeError(f"the judge left {silent} of {len(missing)} prompts without an answer")
