"""Where an adapter's weights belong in a base that holds the language model under another name."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

PREFIX = "base_model.model."
# The language model alone; inside a model of text and images; and there before transformers 4.52.
ROOTS = ("model", "model.language_model", "model.text_model", "language_model.model")
OLD_ROOT, OLD_HEAD = "language_model.model", "language_model.lm_head"


@dataclass(frozen=True)
class Layout:
    """The name of the language model where an adapter was trained, and where it is put on.

    Attributes:
        source: in the adapter's file.
        target: in the base; the same for nearly every adapter.
    """

    source: str
    target: str

    @property
    def moves(self) -> bool:
        return self.source != self.target

    @property
    def key_mapping(self) -> dict[str, str] | None:
        """Patterns of keys and what replaces them, as peft takes them."""
        if not self.moves:
            return None
        mapping = {f"^{re.escape(self.source)}\\.": f"{self.target}."}
        if self.source == OLD_ROOT:
            mapping[f"^{re.escape(OLD_HEAD)}\\."] = "lm_head."
        return mapping

    def in_base(self, key: str) -> str | None:
        """What a key of the file is in the base; None for what is not of the language model.

        That is an adapter's part for the images, which a base of text alone has no place for.
        """
        if not self.moves or not key.startswith(PREFIX):
            return key
        name = key.removeprefix(PREFIX)
        for pattern, replacement in (self.key_mapping or {}).items():
            renamed, count = re.subn(pattern, replacement, name)
            if count:
                return PREFIX + renamed
        return key if name.startswith("lm_head.") else None

    def config(self, config: Any, model: Any) -> Any:
        """An adapter's configuration, with the names that modules have in the base.

        Names that end in the same letters may be of the images' part, so targets are spelled out.
        """
        from peft.tuners.tuners_utils import check_target_module_exists

        if not self.moves:
            return config
        moved = copy.deepcopy(config)
        for field, value in vars(config).items():
            if isinstance(value, list | set | tuple):
                setattr(moved, field, type(value)(map(self._renamed, value)))
            elif isinstance(value, dict):
                setattr(moved, field, {self._renamed(name): v for name, v in value.items()})
        if getattr(config, "target_modules", None):
            moved.target_modules = [
                name
                for name, _ in model.named_modules()
                if (original := self._in_source(name)) is not None
                and check_target_module_exists(config, original)
            ]
            for field in ("exclude_modules", "layers_to_transform", "layers_pattern"):
                if hasattr(moved, field):
                    setattr(moved, field, None)
        return moved

    def _renamed(self, value: Any) -> Any:
        start = f"{self.source}."
        if not isinstance(value, str) or not value.startswith(start):
            return value
        return f"{self.target}.{value.removeprefix(start)}"

    def _in_source(self, name: str) -> str | None:
        start = f"{self.target}."
        if name.startswith(start):
            return f"{self.source}.{name.removeprefix(start)}"
        if name == "lm_head":
            return OLD_HEAD if self.source == OLD_ROOT else name
        return None


def layout_of(model: Any, keys: Iterable[str]) -> Layout:
    """The layout that most of an adapter's keys fit: the base's own, unless another does better."""
    decoder = model.get_decoder()
    names = {name for name, module in model.named_modules()}
    target = next((name for name, module in model.named_modules() if module is decoder), "")
    own = Layout(target, target)
    if target not in ROOTS:
        return own
    keys = list(keys)

    def fit(layout: Layout) -> int:
        return sum(_depth(layout.in_base(key) or "", names) for key in keys)

    return max([own, *(Layout(root, target) for root in ROOTS if root != target)], key=fit)


def _depth(key: str, names: set[str]) -> int:
    """How many parts of a key lead to a module."""
    parts = key.removeprefix(PREFIX).split(".")
    depth = 0
    while depth < len(parts) and ".".join(parts[: depth + 1]) in names:
        depth += 1
    return depth
