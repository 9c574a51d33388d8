"""What an attack was allowed: the mandatory columns of specs/attacks.md 1.4."""

from collections.abc import Mapping
import math
from typing import Any

from ftdefense.data import pools


def columns(
    facts: Mapping[str, Any], roles: Mapping[str, pools.Pool]
) -> dict[str, float | int | None]:
    """Budget columns of one attack.

    Args:
      facts: of the attack's stage: steps, batch_size, roles (rows by role), leading
        shapes, trainable_parameters, learning_rate_mass, lora_scale, sequence_length,
        passes: forwards and backwards over a batch in one step, where they are not
        one for each batch that is drawn; else None; shares: of the steps that
        train on a role's batch, by role, where that is not each of them.
      roles: the attacker's pools; what else it drew from costs passes alone.
    """
    steps, batch = facts["steps"], facts["batch_size"]
    unique = {"harmful": set(), "benign": set()}
    passes = {"harmful": 0.0, "benign": 0.0}
    forward_backwards = 0.0
    for role, leading in facts["leading"].items():
        batches = math.prod(leading)
        share = facts.get("shares", {}).get(role, 1.0)
        forward_backwards += steps * batches * share
        if role not in roles:
            continue
        if not share:
            continue  # Paid for, and of no effect.
        examples = roles[role].examples
        for label in unique:
            mine = [example for example in examples if example.label == label]
            unique[label] |= {example.key for example in mine}
            drawn = steps * batches * batch * share
            passes[label] += drawn * len(mine) / len(examples)
    return {
        "unique_harmful": len(unique["harmful"]),
        "unique_benign": len(unique["benign"]),
        "harmful_passes": round(passes["harmful"]),
        "batch_size": batch,
        "sequence_length": facts["sequence_length"],
        "trainable_parameters": facts["trainable_parameters"],
        "learning_rate_mass": facts["learning_rate_mass"],
        "lora_scale": facts["lora_scale"],
        "forward_backwards": round(steps * facts["passes"])
        if facts.get("passes")
        else round(forward_backwards),
        "trials": 1,
    }
