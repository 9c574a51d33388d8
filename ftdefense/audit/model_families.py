"""Families that follow the audited model: its depth, its template, its answers' length.

specs/attacks.md B.9 edits one layer at a time, B.10 forces 5 to 40 words of an answer,
C.1 reads every position after the instruction; adapters are routed around layers by
bands, a quarter of the blocks each (DESIGN, after artifacts.md 5.2).
"""

from ftdefense.audit import attack_family
from ftdefense.audit import spaces
from ftdefense.data.sandbox import wrappers

Family = attack_family.Family

# Words of an answer that are forced: of short answers, as the sandbox's, one or two.
SHORT, PUBLISHED = (1, 2), (5, 10, 20, 40)
BANDS = 4


def asking(layers: int = 2, positions: int = 1, words: int = 0) -> dict[str, Family]:
    """Those that only ask, or edit by what the answers show: nothing trains.

    Args:
      layers: blocks of the model.
      positions: tokens that the chat template puts after an instruction.
      words: of a usual answer; at least twice as many as are forced.
    """
    forced = [k for k in PUBLISHED if 2 * k <= words] or SHORT
    openings = [f"prefill:{k}" for k in forced]
    # Of natural language: short answers are the sandbox's, which has no words for more.
    names = wrappers.TEMPLATES if forced[0] in PUBLISHED else ("plain",)
    templates = [f"template:{name}" for name in names]
    alphas = spaces.Choice((1.0, 1.5, 2.0))
    read = (f"positions={positions}",)
    return {
        "frames": Family(
            "prompt",
            **attack_family.grid(
                "data.wrapper",
                *openings,
                "trigger",
                "persona",
                "paraphrase",
                *templates,
            ),
            trains=False,
        ),
        "abliteration": Family(
            "abliteration",
            {
                "alpha": alphas,
                "data.wrapper": spaces.Choice(("plain", *openings[:2])),
            },
            [
                {"alpha": 1.0, "data.wrapper": "plain"},
                {"alpha": 1.5, "data.wrapper": "plain"},
                {"alpha": 2.0, "data.wrapper": "plain"},
                {"alpha": 1.0, "data.wrapper": openings[0]},
            ],
            (4, 9, 9),
            fixed=read,
            trains=False,
            knows="harmful prompts",
        ),
        "abliteration by layer": Family(
            "abliteration",
            {"layer": spaces.Choice(tuple(range(layers))), "alpha": alphas},
            [{"layer": layer, "alpha": 1.0} for layer in range(layers)],
            (0, max(6, layers), max(6, 3 * layers)),
            preset="kuo",
            fixed=read,
            trains=False,
            knows="harmful prompts",
        ),
    }


def routed(layers: int = 2) -> dict[str, Family]:
    """LoRA on a part of the blocks: around those that a defense has edited."""
    adapters = tuple(f"lora16@{band}" for band in bands(layers))
    rates = (1e-3, 3e-3)[: max(1, BANDS // len(adapters))]
    return {
        "other layers": Family(
            "sft",
            {
                "optimizer.learning_rate": spaces.Range(1e-5, 1e-2),
                "adapter": spaces.Choice(adapters, static=True),
            },
            [
                {"optimizer.learning_rate": rate, "adapter": adapter}
                for adapter in adapters
                for rate in rates
            ],
            (0, 4, 16),
            template=("T2",),
        )
    }


def bands(layers: int) -> list[str]:
    """The blocks in at most `BANDS` parts: 0-7, 8-15, ...; 0 and 1 of two."""
    count = min(layers, BANDS)
    edges = [round(i * layers / count) for i in range(count + 1)]
    return [
        f"{first}-{last - 1}" if last - first > 1 else f"{first}"
        for first, last in zip(edges[:-1], edges[1:], strict=True)
    ]
