"""One protocol for all measurements of a reproduction: prompts, tokens, training, seeds.

The paper reports few of its settings. Each field says whose choice its value is, and where the
paper states it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any, Literal

from ..checks import check_choice, check_counts, check_field_types, check_seed, check_types
from ..errors import ArgumentError, CorpusError

Scale = Literal["paper", "demo", "smoke"]
METHODS = ("full", "lora", "late_lora")


def _field(default: Any, text: str, place: str = "") -> Any:
    """A field of `Protocol`.

    Args:
        default: its value at the scale "paper".
        text: what it means.
        place: where the paper states that value; empty where it does not.
    """
    return field(default=default, metadata={"help": text, "place": place})


@dataclass(frozen=True)
class Protocol:
    """Every setting of a reproduction; the defaults are those of the scale "paper".

    Raises:
        HyperlensError: if a value is out of range.
    """

    recipe: str = _field("li2026", "training: the preset that the rest starts from")
    n_train: int = _field(2000, "training: sequences", "section 2.1")
    sequence_length: int = _field(256, "training: tokens of each sequence, BOS included")
    packed: bool = _field(False, "training: join all texts and cut them into sequences")
    epochs: int = _field(260, "training: epochs of full fine-tuning", "section 2.1")
    lora_epochs: int = _field(260, "training: epochs of both kinds of LoRA", "section 2.1")
    learning_rate: float = _field(5e-6, "training: learning rate of full fine-tuning")
    lora_learning_rate: float = _field(2e-4, "training: learning rate of both kinds of LoRA")
    last_k: int = _field(5, "training: blocks that late-stage LoRA adapts", "section 5")
    record_every: int = _field(10, "training: epochs between records, 0 for none")
    n_held_out: int = _field(256, "texts that are measured on, never trained on")
    n_prompts: int = _field(30, "texts that are continued", "Table 1")
    prompt_tokens: int = _field(32, "tokens of each prompt, BOS included")
    max_new_tokens: int = _field(256, "tokens added to each prompt", "Table 1")
    max_length: int = _field(256, "tokens per text of teacher-forced measurements")
    bias_tokens: int = _field(500, "tokens that get a static bias", "section 3.5")
    alphas: tuple[float, ...] = _field(
        (0.01, 0.05, 0.1, 0.2, 0.5), "strengths of the static bias", "Table 2"
    )
    min_p: float = _field(0.1, "min-p sampling: smallest share of the top token's", "Table 7")
    guard_window: int = _field(7, "GUARD: its window of entropies", "Table 7")
    n_judged: int = _field(200, "pairs of continuations that the judge compares", "Table 5")
    n_controls: int = _field(19, "null test: random changes that move the stream as far")
    batch_size: int = _field(16, "texts or prompts per forward pass")
    seed: int = _field(0, "of training, prompts and sampling")

    def __post_init__(self) -> None:
        check_field_types(self)
        counts = {
            one.name: getattr(self, one.name)
            for one in fields(self)
            if one.type == "int" and one.name not in ("seed", "record_every")
        }
        check_counts(**counts)
        check_counts(0, record_every=self.record_every)
        check_seed(self.seed)
        if self.prompt_tokens + self.max_new_tokens < 2 or self.prompt_tokens > self.max_length:
            raise CorpusError(
                f"prompt_tokens is {self.prompt_tokens} but texts are cut to max_length "
                f"{self.max_length}: raise max_length or lower prompt_tokens"
            )

    def recipe_changes(self, method: str) -> dict[str, Any]:
        """What `hyperfit` is told for one training method, besides the preset's name."""
        is_full = method == "full"
        records: dict[str, Any] = {
            "n_prompts": self.n_prompts,
            "prompt_tokens": min(self.prompt_tokens, self.sequence_length),
            "new_tokens": max(2, self.max_new_tokens),
        }
        changes: dict[str, Any] = {
            "n_sequences": self.n_train,
            "sequence_length": self.sequence_length,
            "packed": self.packed,
            "epochs": self.epochs if is_full else self.lora_epochs,
            "learning_rate": self.learning_rate if is_full else self.lora_learning_rate,
            "record_every": self.record_every,
            "seed": self.seed,
        }
        # A run is another one only by what it uses: without records, other prompts train nothing.
        changes |= records if self.record_every else {}
        return changes | ({"last_k": self.last_k} if method == "late_lora" else {})

    def generation(self) -> dict[str, int]:
        """What every experiment that generates text is told."""
        return {
            "n_prompts": self.n_prompts,
            "prompt_tokens": self.prompt_tokens,
            "max_new_tokens": self.max_new_tokens,
            "batch_size": self.batch_size,
            "seed": self.seed,
        }

    def origins(self) -> dict[str, str]:
        """Field to whose value it is: the paper's, with the place, or ours."""
        paper = Protocol.__dataclass_fields__
        return {
            name: f"paper, {one.metadata['place']}"
            if one.metadata["place"] and getattr(self, name) == one.default
            else "ours"
            for name, one in paper.items()
        }

    def describe(self) -> str:
        """A line per field: name, value, whose choice it is, and what it means."""
        return "\n".join(
            f"{name:<19} {_short(getattr(self, name)):<22} {origin:<19} {HELP[name]}"
            for name, origin in self.origins().items()
        )

    def to_json(self) -> dict[str, Any]:
        """Every field as a JSON value."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


HELP: Mapping[str, str] = MappingProxyType(
    {one.name: one.metadata["help"] for one in fields(Protocol)}
)

# What differs from the paper's scale. "demo" hyperfits the embedded model within minutes, "smoke"
# only runs every step once: its numbers mean nothing.
SCALES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "paper": MappingProxyType({}),
        "demo": MappingProxyType(
            {
                "recipe": "demo",
                "n_train": 32,
                "sequence_length": 160,
                "epochs": 20,
                "lora_epochs": 40,
                "learning_rate": 1e-3,
                "lora_learning_rate": 4e-3,
                "record_every": 10,
                "n_held_out": 34,
                "n_prompts": 32,
                "prompt_tokens": 17,
                "max_new_tokens": 96,
                "n_judged": 32,
            }
        ),
        "smoke": MappingProxyType(
            {
                "recipe": "demo",
                "n_train": 4,
                "sequence_length": 24,
                "epochs": 2,
                "lora_epochs": 2,
                "learning_rate": 1e-3,
                "lora_learning_rate": 4e-3,
                "last_k": 1,
                "record_every": 1,
                "n_held_out": 6,
                "n_prompts": 4,
                "prompt_tokens": 8,
                "max_new_tokens": 8,
                "max_length": 24,
                "bias_tokens": 10,
                "alphas": (0.1, 0.5),
                "n_judged": 4,
                "n_controls": 1,
            }
        ),
    }
)


@check_types
def protocol_for(scale: Scale = "paper", **changes: Any) -> Protocol:
    """The protocol of a scale, with changes.

    Args:
        scale: "paper", "demo" (the embedded model, minutes on two cores) or "smoke" (every step
            once, with numbers that mean nothing).
        changes: other values for fields of `Protocol`.

    Raises:
        HyperlensError: if there is no such scale or field, or a value is out of range.

    >>> protocol = protocol_for("demo", epochs=5)
    >>> protocol.epochs, protocol.n_prompts, protocol.origins()["bias_tokens"]
    (5, 32, 'paper, section 3.5')
    """
    check_choice("scale", scale, tuple(SCALES))
    for name in changes:
        if name not in HELP:
            raise ArgumentError(f"a protocol has no field {name!r}: expected {', '.join(HELP)}")
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in changes.items()
    }
    return replace(Protocol(**SCALES[scale]), **values)


def _short(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
