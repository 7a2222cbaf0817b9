"""Which of the two models lends its activations or weights, and what they should bring about."""

from __future__ import annotations

INTO_BASE, INTO_TUNED = "tuned into base", "base into tuned"
DIRECTIONS = (INTO_BASE, INTO_TUNED)

# The metric that counts what a direction is meant to bring about, and what that is.
TOWARDS = {INTO_BASE: "to_tuned", INTO_TUNED: "to_base"}
BROUGHT = {
    INTO_BASE: "changed decisions that become the tuned model's",
    INTO_TUNED: "changed decisions that become the base's again",
}
