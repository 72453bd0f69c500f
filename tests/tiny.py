"""A small experiment as a user writes it: 8 x 8 pictures in a file, and two recipes, a teacher's and a student's."""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from diffdistill import api
from diffdistill.cli import main
from diffdistill.perceptual import vgg16

NUM_CLASSES = 3


def write_images(path: Path, *, size: int = 8, channels: int = 3, high: int = 256, classes: int = NUM_CLASSES) -> Path:
    """An .npz of 60 noisy pictures whose brightness tells their class."""
    labels = np.arange(60) % classes
    noise = np.random.default_rng(0).integers(0, high, (60, size, size, channels))
    images = (noise // 2 + (labels * high // (2 * classes))[:, None, None, None]).astype(np.uint8)
    np.savez(path, images=images, labels=labels)
    return path


def teacher_recipe(folder: Path) -> dict:
    """A `denoise` run of a few seconds, in folder/teacher, on folder/images.npz."""
    network = {
        "sample_size": 8,
        "block_out_channels": [8, 8],
        "layers_per_block": 1,
        "down_block_types": ["DownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "UpBlock2D"],
        "norm_num_groups": 4,
        "num_class_embeds": NUM_CLASSES,
    }
    meaning = {"process": {"name": "ve", "sigma_max": 20.0}, "prediction": "f", "clock": "edm", "scale_input": True}
    return {
        "output": str(folder / "teacher"),
        "method": {"name": "denoise"},
        "generator": {
            "grid": {"steps": 3},
            "step_rule": "heun",
            "denoiser": meaning,
            "network": {"name": "UNet2DModel", "options": network},
        },
        "data": {"name": "folder", "path": str(write_images(folder / "images.npz"))},
        "players": {"generator": {"learning_rate": 1e-3}},
        "averages": {"fast": {"name": "constant", "beta": 0.5}},
        "train": {"steps": 4, "batch": 6, "log_every": 2, "save_every": 2, "device": "cpu", "threads": 1},
    }


def large_teacher(folder: Path) -> Path:
    """An exported teacher of 28 x 28 pictures, which the shipped extractor takes, and they in folder/large.npz."""
    recipe = teacher_recipe(folder)
    recipe["generator"]["network"]["options"]["sample_size"] = 28
    recipe["data"] = {"name": "folder", "path": str(write_images(folder / "large.npz", size=28))}
    recipe["train"] |= {"steps": 1, "batch": 2}
    run = api.distill(recipe, say=lambda line: None)
    return api.export_denoiser(run, folder / "exported", weights="raw")


def student_recipe(folder: Path, teacher: Path) -> dict:
    """A one-step DMD2 run with the GAN term, in folder/student."""
    player = {"learning_rate": 1e-4}
    return {
        "output": str(folder / "student"),
        "teacher": {"path": str(teacher)},
        "method": {"name": "dmd2", "ratio": 2, "gan_weight": 1e-3, "gan_critic_weight": 1e-2},
        "critic": {"taps": ["network.mid_block"]},
        "generator": {"grid": [20.0]},
        "data": {"name": "folder", "path": str(write_images(folder / "images.npz"))},
        "players": {"generator": player, "critic": player},
        "train": {"steps": 2, "batch": 6, "log_every": 1, "save_every": 2, "device": "cpu", "threads": 1},
    }


def write_vgg16(path: Path, *, seed: int = 0) -> Path:
    """A VGG16 of random weights that keep the size of what runs through them, named as in torchvision's file."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, tensor in vgg16().state_dict().items():
        std = (2 / tensor[0].numel()) ** 0.5 if tensor.ndim == 4 else 0.1
        state[f"features.{name}"] = std * torch.randn(tensor.shape, generator=generator)
    save_file(state, path)
    return path


def write_clip(folder: Path) -> Path:
    """A tiny CLIP of the real classes, which reads letters, of random weights, as a folder."""
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    letters = [*"abcdefghijklmnopqrstuvwxyz"]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    text = CLIPTextConfig(**sizes, vocab_size=len(words), max_position_embeddings=12, eos_token_id=len(words) - 1,
                          bos_token_id=len(words) - 2, pad_token_id=len(words) - 1)  # fmt: skip
    vision = CLIPVisionConfig(**sizes, image_size=16, patch_size=8)
    CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8)).save_pretrained(
        folder
    )
    CLIPTokenizer({word: place for place, word in enumerate(words)}, []).save_pretrained(folder)
    return folder


def write_recipe(path: Path, recipe: dict) -> Path:
    """The recipe as a YAML file (JSON is YAML)."""
    path.write_text(json.dumps(recipe))
    return path


def refused(capsys, *arguments: object) -> str:
    """The one line with which a command refuses the user's mistake."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    assert err.endswith("\n") and err.count("\n") == 1, err
    assert "Traceback" not in out + err
    return err.strip()
