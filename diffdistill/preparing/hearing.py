"""From what was heard of a pipeline to how its network is called, and to the rows of its prompts."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffdistill.preparing.listening import Heard, Tape, listening
from diffdistill.prompts import EACH, LIST, MAPPING, RAGGED, ROW, SHARED, TUPLE, VALUE, Call

STEPS = 3  # of the calls that are listened to for how the time is told
CLOSE = 1e-3  # relative, between what a network gave and what its scheduler took: pipelines may round in between
TIME_SCALES, TIME_SHIFTS = (1.0, -1.0, 1e-3, -1e-3), (0.0, 1.0, 1000.0)
# Where a pipeline leaves out a mask that would be all true: the argument it belongs to, and its own name.
MASKS = {"QwenImageTransformer2DModel": ("encoder_hidden_states", "encoder_hidden_states_mask")}
FROM_CONDITIONAL = ("ZImagePipeline",)  # whose scale w is that of c + w (c - u), where 0 is none
TRUE_SCALE, SCALE, NEGATIVE = "true_cfg_scale", "guidance_scale", "negative_prompt"
PLAIN = (type(None), bool, int, float, str)


class Unheard(ValueError):
    """A pipeline that calls its network in a way that is not understood; the message says what was heard."""


@dataclass(frozen=True)
class Listener:
    """Asks a pipeline for samples and listens.

    Args:
        pipeline: a text-conditioned one of diffusers, whose scheduler takes first-order steps.
        options: arguments of each call, e.g. height.
        negative: the negative prompt.
    """

    pipeline: Any
    options: Mapping[str, Any]
    negative: str = ""

    @property
    def off(self) -> dict[str, float]:
        """Arguments of a call without guidance; a network that embeds its scale is told that of the options."""
        return self._scale(1.0)

    def unguided(
        self,
        texts: Sequence[str],
        *,
        steps: int = 1,
        first_step_only: bool = True,
        draws: torch.Generator | None = None,
    ) -> Tape:
        """The tape of a call without guidance, with the noise that `draws` gives."""
        return self._listen(texts, steps, first_step_only, self.off, draws)

    def guided(self, texts: Sequence[str], scale: float, *, steps: int = 1, first_step_only: bool = True) -> Tape:
        """The tape of a call with guidance."""
        on: dict[str, Any] = self._scale(scale)
        if NEGATIVE in self.takes:
            on[NEGATIVE] = [self.negative] * len(texts)
        return self._listen(texts, steps, first_step_only, on)

    def _scale(self, scale: float) -> dict[str, float]:
        """The argument that says w of u + w (c - u)."""
        theirs = scale - 1 if type(self.pipeline).__name__ in FROM_CONDITIONAL else scale
        return {TRUE_SCALE if TRUE_SCALE in self.takes else SCALE: theirs}

    @property
    def takes(self) -> Mapping[str, inspect.Parameter]:
        return inspect.signature(self.pipeline.__call__).parameters

    def _listen(
        self,
        texts: Sequence[str],
        steps: int,
        first_step_only: bool,
        scale: Mapping[str, Any],
        draws: torch.Generator | None = None,
    ) -> Tape:
        with listening(self.pipeline, first_step_only=first_step_only) as tape, torch.no_grad():
            self.pipeline(
                prompt=list(texts),
                generator=draws or torch.Generator().manual_seed(0),
                output_type="latent",
                **{"num_inference_steps": steps, **self.options, **scale},
            )
        kind = type(getattr(self.pipeline, "transformer", None)).__name__
        for heard in tape.calls if kind in MASKS else ():
            states, mask = MASKS[kind]
            if heard.arguments.get(mask) is None:
                heard.arguments[mask] = torch.ones(heard.arguments[states].shape[:2], dtype=torch.bool)
        return tape


def tree_of(two: Any, three: Any, later: Any, path: str) -> dict[str, Any]:
    """The kind and place of an argument, from calls with two and with three prompts, and from a later step of the
    first.

    Raises:
        Unheard: it changes from step to step, or with the batch in an unknown way.
    """
    if not _equal(two, later):
        raise Unheard(f"the pipeline changes {path} from step to step, which no prepared prompt can say")
    sizes = [
        len(part) if isinstance(part, list | tuple) or (isinstance(part, Tensor) and part.ndim) else None
        for part in (two, three)
    ]
    if isinstance(two, Tensor):
        if sizes == [2, 3]:
            return {ROW: path}
        if _equal(two, three):
            return {SHARED: path}
    elif isinstance(two, Mapping):
        return {MAPPING: {name: tree_of(two[name], three[name], later[name], f"{path}.{name}") for name in two}}
    elif isinstance(two, list) and sizes == [2, 3]:
        if isinstance(two[0], Tensor):
            return {RAGGED: path}
        if all(_equal(two[0], part) for part in (*two, *three)):
            return {EACH: two[0]}
    elif isinstance(two, list | tuple) and sizes[0] == sizes[1]:
        parts = [
            tree_of(*three_of, f"{path}.{place}") for place, three_of in enumerate(zip(two, three, later, strict=True))
        ]
        return {LIST if isinstance(two, list) else TUPLE: parts}
    elif isinstance(two, PLAIN) and two == three:
        return {VALUE: two}
    raise Unheard(
        f"the pipeline gives its network {path} as {_told(two)} for two prompts and {_told(three)} for three, which is "
        "neither one row for each nor the same for all"
    )


def rows_of(tree: Mapping[str, Any], argument: Any) -> dict[str, Tensor]:
    """The rows in one argument of a call, by name; entries of a list are padded with zeros, their lengths beside."""
    ((kind, content),) = tree.items()
    match kind:
        case "row":
            return {content: argument}
        case "ragged":
            lengths = torch.tensor([len(part) for part in argument])
            return {content: torch.nn.utils.rnn.pad_sequence(argument, batch_first=True), f"{content}.length": lengths}
        case "dict":
            parts = [rows_of(part, argument[name]) for name, part in content.items()]
        case "tuple" | "list":
            parts = [rows_of(*pair) for pair in zip(content, argument, strict=True)]
        case _:
            parts = []
    return {name: rows for part in parts for name, rows in part.items()}


def shared_of(tree: Mapping[str, Any], argument: Any) -> dict[str, Tensor]:
    """The tensors in one argument of a call that are the same for all prompts."""
    ((kind, content),) = tree.items()
    match kind:
        case "shared":
            return {content: argument}
        case "dict":
            parts = [shared_of(part, argument[name]) for name, part in content.items()]
        case "tuple" | "list":
            parts = [shared_of(*pair) for pair in zip(content, argument, strict=True)]
        case _:
            parts = []
    return {name: tensor for part in parts for name, tensor in part.items()}


def call_of(two: Tape, three: Tape, clocks: Sequence[float]) -> tuple[Call, dict[str, Tensor]]:
    """How the network is called, and what is the same for all prompts.

    Args:
        two, three: tapes of STEPS steps, unguided, with so many prompts.
        clocks: what the denoiser's clock says at these steps.
    Raises:
        Unheard: the network's output, its time or an argument is not understood.
    """
    first, later, more = two.calls[0], two.calls[1], three.calls[0]
    arguments = {
        name: tree_of(value, more.arguments[name], later.arguments[name], name)
        for name, value in first.arguments.items()
        if name != "return_dict"
    }
    shared = {}
    for name, tree in arguments.items():
        shared |= shared_of(tree, first.arguments[name])
    scale, shift = _time(two.calls, clocks)
    sign = _sign(first, two.steps[0].output)
    arguments["return_dict"] = {VALUE: False}
    return Call(first.sample, first.time, scale, shift, sign, isinstance(first.x, list), arguments), shared


def branches(listener: Listener, call: Call, texts: Sequence[str], scale: float) -> tuple[dict, dict | None]:
    """The rows of some prompts, and those of the negative prompt beside each; None where guidance is not to be had."""
    (plain,) = listener.unguided(texts).calls
    wanted = rows_in(call, plain.arguments)
    heard = listener.guided(texts, scale).calls
    if len(heard) == 1 and len(heard[0].x) == len(texts):
        return wanted, None
    parts = [rows_in(call, one.arguments) for one in heard]
    if len(parts) == 1:
        count = len(texts)
        parts = [
            {name: rows[:count] for name, rows in parts[0].items()},
            {name: rows[count:] for name, rows in parts[0].items()},
        ]
    if len(parts) != 2 or any(len(rows) != len(texts) for part in parts for rows in part.values()):
        raise Unheard(f"guidance called the network {len(heard)} times in a step, with {len(heard[0].x)} samples each")
    ours = [index for index, part in enumerate(parts) if _close_rows(part, wanted)]
    if not ours:
        raise Unheard("with guidance, the pipeline tells its network something else of the prompts than without")
    return wanted, parts[1 - ours[-1]]


def rows_in(call: Call, arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    found = {}
    for name, tree in call.arguments.items():
        if name != "return_dict":
            found |= rows_of(tree, arguments[name])
    return found


def _close_rows(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return all(
        one[name].shape == other[name].shape
        and torch.allclose(one[name].double(), other[name].double(), atol=1e-4, rtol=CLOSE)
        for name in other
    )


def _time(calls: Sequence[Heard], clocks: Sequence[float]) -> tuple[float, float]:
    """Scale and shift of the clock, as the network is told it."""
    told = [heard.told.double().flatten()[0].item() for heard in calls]
    for scale in TIME_SCALES:
        for shift in TIME_SHIFTS:
            if all(
                abs(scale * clock + shift - time) <= 1e-2 * abs(scale) * max(1, abs(clock))
                for clock, time in zip(clocks, told, strict=True)
            ):
                return scale, shift
    raise Unheard(
        f"the network is told the times {told}, and the scheduler's are {list(clocks)}: no scale relates them"
    )


def _sign(heard: Heard, taken: Tensor) -> int:
    """1 or -1: the network's output times this, perhaps its first half of channels, is what the scheduler took."""
    output = output_of(heard.output, taken.shape[1])
    for sign in (1, -1):
        if output.shape == taken.shape and torch.allclose(
            sign * output.double(), taken.double(), rtol=CLOSE, atol=CLOSE * taken.abs().max().item()
        ):
            return sign
    raise Unheard(
        f"the scheduler takes {tuple(taken.shape)} where the network gave {tuple(output.shape)}, and neither that nor "
        "its negative; the pipeline does something in between"
    )


def output_of(output: Tensor | Sequence[Tensor], channels: int) -> Tensor:
    """A network's output as one tensor, without the learned variance that some have behind the prediction."""
    if not isinstance(output, Tensor):
        output = torch.stack(list(output)).squeeze(2)
    return output[:, :channels] if output.shape[1] == 2 * channels else output


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(_equal(one[name], other[name]) for name in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(_equal(*pair) for pair in zip(one, other, strict=True))
    return one == other


def _told(value: Any) -> str:
    return f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)[:80]
