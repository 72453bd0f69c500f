"""Networks on disk: `denoiser.json` says what a network means, `network/` holds it; and what diffusers itself wrote."""

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from diffdistill.backbones.diffusers import FAMILIES, DiffusersBackbone
from diffdistill.backbones.mlp import MLP
from diffdistill.backbones.pipeline import PipelineBackbone
from diffdistill.backbones.scheduler import meaning
from diffdistill.denoiser import Backbone
from diffdistill.prompts import Prompts
from diffdistill.told import TELLABLE

MEANING, NETWORK = "denoiser.json", "network"
TOLD = "told.safetensors"  # beside a network of diffusers that is told more than its time: what tells it
COMPONENTS = ("unet", "transformer")  # names that pipelines give to their network
META = torch.device("meta")  # shapes without numbers: what `check` plans memory on


def make_backbone(
    name: str,
    options: Mapping[str, Any],
    *,
    null_label: int | None,
    checkpointing: bool,
    prompts: Prompts | None = None,
) -> Backbone:
    """A network of random weights: MLP, any diffusers class with a family, or any at all that is told prompts.

    Raises:
        ValueError: the class or an option is unknown, or the options do not go together.
    """
    kind = MLP if name == "MLP" else _diffusers_class(name, "network.name", prompts)
    try:
        network = kind(**options)
    except (TypeError, ValueError, KeyError) as error:
        raise ValueError(f"network.options do not make a {name}: {error}") from error
    return network if name == "MLP" else _adapted(network, prompts, null_label, checkpointing)


def _adapted(network: nn.Module, prompts: Prompts | None, null_label: int | None, checkpointing: bool) -> Backbone:
    if prompts is None:
        return DiffusersBackbone(network, null_label=null_label, gradient_checkpointing=checkpointing)
    if null_label is not None:
        raise ValueError(f"null_label={null_label} is of networks with classes, and this one is told prompts")
    return PipelineBackbone(network, prompts, gradient_checkpointing=checkpointing)


def read_backbone(
    folder: Path,
    *,
    null_label: int | None,
    checkpointing: bool,
    device: torch.device | str = "cpu",
    prompts: Prompts | None = None,
) -> Backbone:
    """A network in diffusers' format, or an MLP in ours, in float32.

    Args:
        prompts: of a network that is told these.
        device: on META the weights are not read, and hold no memory.
    Raises:
        ValueError: a file is missing or damaged, or the weights are not those of the config.
    """
    config = read_json(folder / "config.json", "give a folder with a network in diffusers' format")
    name = config.get("_class_name")
    if torch.device(device) == META:
        options = {key: value for key, value in config.items() if not key.startswith("_")}
        with META:
            backbone = make_backbone(name, options, null_label=null_label, checkpointing=checkpointing, prompts=prompts)
            for name in _told(folder):
                backbone.tell(name)
        return backbone
    if name == "MLP":
        return _read_mlp(folder, config).to(device)
    kind = _diffusers_class(name, str(folder / "config.json"), prompts)
    if not list(folder.glob("*.safetensors")):
        raise ValueError(
            f"there are no safetensors weights in {folder}; if it has pickled ones (.bin), load them with diffusers "
            "where you trust them, and write them again with save_pretrained(..., safe_serialization=True)"
        )
    variant = "fp16" if list(folder.glob("*.fp16.safetensors")) else None
    from diffusers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # its warnings about weights are an error below, in one line
    try:
        network, report = kind.from_pretrained(
            folder,
            variant=variant,
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            # the fast path reports missing weights in another way for each kind of mistake; some classes want it
            low_cpu_mem_usage=bool(kind._keep_in_fp32_modules),
            ignore_mismatched_sizes=True,  # so that they are in the report, and refused below
            output_loading_info=True,
        )
    except (OSError, RuntimeError, TypeError, ValueError, SafetensorError) as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(f"the weights in {folder} could not be read: {first}; restore the folder") from error
    finally:
        logging.set_verbosity(verbosity)
    wrong = {kind: entries for kind, entries in report.items() if entries}
    if wrong:
        raise ValueError(
            f"the weights in {folder} are not those of its config.json: {_summary(wrong)}; restore the folder, or give "
            "the config that belongs to them"
        )
    for tensor in (*network.parameters(), *network.buffers()):
        # Weights mapped from a file start anywhere, and unaligned ones give other last bits than the same weights do
        # after training or resuming (1e-6 through a small UNet).
        tensor.data = tensor.data.clone()
    backbone = _adapted(network, prompts, null_label, checkpointing)
    for name in _told(folder):
        backbone.tell(name)
    if backbone.told:
        try:
            backbone.told.load_state_dict({name: tensor.float() for name, tensor in load_file(folder / TOLD).items()})
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{folder / TOLD} does not fit the network: {reason}; restore the folder") from error
    return backbone.to(device)


def _told(folder: Path) -> list[str]:
    """What the network in the folder is told besides its time and class."""
    if not (folder / TOLD).is_file():
        return []
    try:
        with safe_open(folder / TOLD, framework="pt") as file:
            names = dict.fromkeys(key.partition(".")[0] for key in file.keys())
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{folder / TOLD} could not be read: {error}; restore the folder") from error
    if unknown := names.keys() - TELLABLE.keys():
        raise ValueError(f"{folder / TOLD} tells {', '.join(unknown)}; known are {', '.join(TELLABLE)}")
    return list(names)


def read_diffusers(
    path_or_name: str | Path,
    *,
    null_label: int | None = None,
    checkpointing: bool = False,
    device: torch.device | str = "cpu",
    prompts: Prompts | None = None,
) -> tuple[Backbone, dict[str, Any] | None]:
    """A network that diffusers wrote, in float32, and what its scheduler says that it means.

    Args:
        path_or_name: a pipeline's folder (model_index.json), a network's (config.json), or the name of a pipeline on
            the Hugging Face hub, which is downloaded to its cache.
        null_label: the label of a UNet that was trained as "no class"; no file says so.
        device, prompts: as for `read_backbone`; with prompts, what the network means is what their pipeline's
            scheduler said.
    Returns:
        The backbone, and the plain data of a DenoiserConfig; None for a network's folder, which has no scheduler.
    Raises:
        ValueError: nothing readable is there, or the scheduler says something that a denoiser here cannot mean.
    """
    folder = Path(path_or_name)
    if not folder.is_dir():
        folder = _download(str(path_or_name))
    options = {"null_label": null_label, "checkpointing": checkpointing, "device": device, "prompts": prompts}
    if not (folder / "model_index.json").is_file():
        return read_backbone(folder, **options), None if prompts is None else dict(prompts.meaning)
    index = read_json(folder / "model_index.json", "give a pipeline's folder")
    networks = [name for name in COMPONENTS if name in index]
    if not networks:
        raise ValueError(f"{folder / 'model_index.json'} names no {' or '.join(COMPONENTS)}; give a diffusion pipeline")
    if prompts is not None:
        return read_backbone(folder / networks[0], **options), dict(prompts.meaning)
    config = read_json(folder / "scheduler" / "scheduler_config.json", "give a pipeline that was saved whole")
    try:
        said = meaning(config)
    except ValueError as error:
        raise ValueError(f"{folder / 'scheduler' / 'scheduler_config.json'}: {error}") from error
    said["null_label"] = -1 if null_label is None else null_label
    return read_backbone(folder / networks[0], **options), said


def write_backbone(backbone: Backbone, folder: Path, *, half: bool) -> None:
    """The network in diffusers' format, or an MLP in ours; half: as fp16."""
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(backbone, MLP):
        (folder / "config.json").write_text(json.dumps({"_class_name": "MLP", **backbone.options}, indent=1) + "\n")
        save_file(_weights(backbone, half), folder / "weights.safetensors")
        return
    network: nn.Module = backbone.network
    network.save_config(folder)
    name = "diffusion_pytorch_model.fp16.safetensors" if half else "diffusion_pytorch_model.safetensors"
    save_file(_weights(network, half), folder / name, metadata={"format": "pt"})
    if backbone.told:
        save_file(_weights(backbone.told, half), folder / TOLD)


def _weights(module: nn.Module, half: bool) -> dict[str, torch.Tensor]:
    """The module's state on the CPU, its floating-point tensors in fp16 if `half`.

    Raises:
        ValueError: a weight is beyond fp16's range.
    """
    state = {}
    for name, tensor in module.state_dict().items():
        tensor = tensor.detach().cpu()
        if half and tensor.is_floating_point():
            rounded = tensor.half()
            if not rounded.isfinite().all() and tensor.isfinite().all():
                raise ValueError(f"{name} has values beyond fp16's range of 65504; write float32 weights instead")
            tensor = rounded
        state[name] = tensor.contiguous()
    return state


def _read_mlp(folder: Path, config: Mapping[str, Any]) -> MLP:
    try:
        backbone = MLP(**{key: value for key, value in config.items() if key != "_class_name"})
        weights = load_file(folder / "weights.safetensors")
        backbone.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    except (OSError, RuntimeError, TypeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        file = folder / "weights.safetensors"
        raise ValueError(f"{file} and its config.json could not be read: {reason}; restore the folder") from error
    return backbone


def read_json(file: Path, way_out: str) -> dict[str, Any]:
    if not file.is_file():
        raise ValueError(f"there is no {file}; {way_out}")
    try:
        return json.loads(file.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} is damaged ({error}); restore it") from error


def _diffusers_class(name: Any, where: str, prompts: Prompts | None) -> type[nn.Module]:
    diffusers = importlib.import_module("diffusers")
    kind = getattr(diffusers, str(name), None)
    if prompts is None and name in FAMILIES:
        return kind
    if not (isinstance(kind, type) and issubclass(kind, diffusers.ModelMixin)):
        raise ValueError(f"{where}={name!r} is not a known network; known are MLP, {', '.join(FAMILIES)}")
    if prompts is None:
        raise ValueError(
            f"{where}: a {name} is told prompts; make some by: diffdistill prepare PIPELINE --prompts FILE --out "
            "FOLDER, and give that folder as teacher.prompts"
        )
    if name != prompts.network:
        raise ValueError(
            f"{where}: the prompts were made for a {prompts.network}, not for a {name}; prepare them again"
        )
    return kind


def _summary(report: Mapping[str, Any]) -> str:
    """A loading report in one line, e.g. `2 missing_keys, first conv_in.weight`."""
    return "; ".join(f"{len(entries)} {kind}, first {entries[0]}" for kind, entries in report.items())


def _download(name: str) -> Path:
    """The snapshot of a pipeline on the hub: index, network and scheduler, safetensors only."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    wanted = [f"{part}/*.{kind}" for part in (*COMPONENTS, "scheduler") for kind in ("json", "safetensors")]
    try:
        return Path(snapshot_download(name, allow_patterns=["model_index.json", "config.json", *wanted]))
    except (HFValidationError, OSError) as error:  # what the hub and the network answer are OSErrors
        raise ValueError(
            f"{name!r} is neither a folder nor a pipeline that the hub gave: {str(error).strip().splitlines()[0]}"
        ) from error
