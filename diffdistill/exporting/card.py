"""The README.md of an exported folder."""

from typing import Any

from diffdistill.exporting.stock import Stock

CARD = """---
library_name: diffusers
---

# A {steps} generator, distilled with diffdistill

A `{pipeline}` with a `{scheduler}`, both as they come with diffusers {version}. Run this from inside the folder:

```python
{snippet}
```

Started from the same noise, it reproduces the generator that was trained: the largest absolute difference, before
the pictures are clamped, was {difference:.1e} in float32. Only the call above is what was trained and compared; other
numbers of steps and other timesteps are not.
{notes}"""


def snippet(stock: Stock, num_classes: int) -> str:
    """A script that loads the folder it is run in and writes sample.png."""
    count = 4
    labels = [index % num_classes for index in range(count)] if num_classes else None
    arguments: dict[str, Any] = stock.arguments(labels, count)
    lines = [f"    {name}={value!r}," for name, value in arguments.items()]
    return "\n".join(
        [
            "import torch",
            "from diffusers import DiffusionPipeline",
            "",
            'pipeline = DiffusionPipeline.from_pretrained(".", dtype=torch.float32)',
            "images = pipeline(",
            *lines,
            "    generator=torch.manual_seed(0),",
            ").images",
            'images[0].save("sample.png")',
        ]
    )


def card(stock: Stock, *, num_classes: int, num_steps: int, difference: float) -> str:
    """The text of README.md."""
    import diffusers

    notes = [*stock.notes]
    if num_classes:
        notes.append(f"Class labels are 0 ... {num_classes - 1}; always give them.")
    return CARD.format(
        steps="one-step" if num_steps == 1 else f"{num_steps}-step",
        pipeline=type(stock.pipeline).__name__,
        scheduler=type(stock.pipeline.scheduler).__name__,
        version=diffusers.__version__,
        snippet=snippet(stock, num_classes),
        difference=difference,
        notes="".join(f"\n- {note}" for note in notes) + ("\n" if notes else ""),
    )
