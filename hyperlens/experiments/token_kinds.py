"""What kind of token a model picked: pure functions of ids and texts.

The word lists are English; in other languages function words read as content words.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

KINDS = ("function word", "content word", "subword", "number", "punctuation", "other")

# Words that carry grammar rather than matter: articles, pronouns, prepositions, conjunctions,
# auxiliaries, and the adverbs that behave like them. Our own list.
FUNCTION_WORDS = frozenset(
    """
    a about above after again against all along although am among an and another any are
    around as at away back be because been before behind being below beneath beside besides
    between beyond both but by can cannot could did do does doing done down during each either
    else enough even ever every few for from had has have having he hence her here hers
    herself him himself his how however i if in indeed inside into is it its itself just least
    less lest like many may me might mine more most much must my myself near neither never
    nevertheless no none nor not now of off often on once one only onto or other others ought
    our ours ourselves out outside over own past perhaps quite rather same shall she should
    since so some still such than that the thee their theirs them themselves then thence there
    therefore these they thine this those thou though through throughout thus thy till to
    together too toward towards under underneath unless until unto up upon us very was we well
    were what whatever when whence where whereas wherever whether which while whither who
    whoever whole whom whose why will with within without would ye yet you your yours yourself
    yourselves
    """.split()  # noqa: SIM905 - as a list it would take a screen
)


def kind_of(token: str, before: str) -> str:
    """The kind of a token, given its text and the text right before it.

    A piece of letters that continues a word is a "subword"; the first piece of a word counts as
    that word, so a content word may be cut short. A piece of a character, whose text holds
    "\ufffd", is "other": it is no letter, whatever the tokenizer calls it.
    """
    bare = token.strip()
    if not bare or "\ufffd" in bare:
        return "other"
    if all(unicodedata.category(c)[0] in "PS" for c in bare):
        return "punctuation"
    if any(c.isdigit() for c in bare):
        return "number"
    if not bare[0].isalpha():
        # An apostrophe or a hyphen that leads into letters, as in 's or -like.
        return "subword" if before[-1:].isalnum() and token[0] == bare[0] else "other"
    if token[0] == bare[0] and before[-1:].isalnum():
        return "subword"
    return "function word" if bare.lower() in FUNCTION_WORDS else "content word"


def repeats(context: Sequence[int], token: int, n: int) -> bool:
    """Whether this token would complete an n-gram that the context already holds."""
    if len(context) < n - 1:
        return False
    start = [*context[len(context) - n + 1 :], token]
    return any(list(context[i : i + n]) == start for i in range(len(context) - n + 1))
