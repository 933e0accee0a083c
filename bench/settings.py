"""What a bench run was asked for, with everything that depends on the device filled in."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from cases import (
    DTYPES,
    MECHANISMS,
    SOFTMAX,
    UNFUSED,
    Backbone,
    Case,
    check_mechanisms,
    default_backbone,
    mechanism_options,
    rounded_size,
)
from cost import num_tokens
from timing import bfloat16_pays_on_cpu, fastest_sdpa_backend
from timm.models.vision_transformer import VisionTransformer


@dataclass(frozen=True)
class Settings:
    """What the command line asks for, with everything that depends on the device filled in.

    Attributes:
        backbone: The network around the mechanisms.
        outline: That network without memory for its weights.
        device: Where everything runs.
        protocol: ``paper`` or ``best``.
        dtype: Name of the dtype of weights and activations.
        batch: Images of one forward pass.
        mechanisms: In the order of the rows.
        most_rounds: Largest number of timed rounds.
        compile: ``auto``, ``on`` or ``off``.
        sdpa: ``auto`` or the name of a backend.
        softmax: By image size, what softmax attention is computed by; see :meth:`softmax_at`.
    """

    backbone: Backbone
    outline: VisionTransformer
    device: torch.device
    protocol: str
    dtype: str
    batch: int
    mechanisms: tuple[str, ...]
    most_rounds: int
    compile: str
    sdpa: str
    softmax: dict[tuple[int, int], str] = field(default_factory=dict)

    @property
    def patch_size(self) -> tuple[int, int]:
        return tuple(self.outline.patch_embed.patch_size)

    def softmax_at(self, image_size: tuple[int, int]) -> str:
        """``unfused``, the backend asked for, or whichever is fastest at this size, found out once."""
        if self.protocol == "paper":
            return UNFUSED
        if self.sdpa != "auto":
            return self.sdpa
        if image_size not in self.softmax:
            attention = self.outline.blocks[0].attn
            shape = (self.batch, num_tokens(self.outline, image_size), 3, attention.num_heads, attention.head_dim)
            packed = torch.randn(shape, generator=torch.Generator().manual_seed(0))
            q, k, v = packed.to(self.device, DTYPES[self.dtype]).permute(2, 0, 3, 1, 4).unbind(0)
            self.softmax[image_size] = fastest_sdpa_backend(q, k, v)
        return self.softmax[image_size]

    def case(self, mechanism: str, image_size: tuple[int, int]) -> Case:
        softmax = self.softmax_at(image_size) if mechanism == SOFTMAX else None
        options = mechanism_options(mechanism, self.protocol)
        return Case(self.backbone, mechanism, image_size, options, self.batch, self.dtype, softmax)

    def cases(self, image_size: tuple[int, int]) -> dict[str, Case]:
        return {mechanism: self.case(mechanism, image_size) for mechanism in self.mechanisms}


def build_settings(options: argparse.Namespace) -> tuple[Settings, list[str]]:
    """Settings, and notes about what was chosen; the first says which network.

    Raises:
        ValueError: A mechanism that the bench does not know, or a backbone that is none.
    """
    check_mechanisms(options.mechanisms)
    device = pick_device(options.device)
    on_gpu = device.type == "cuda"
    backbone = default_backbone(device)
    if options.backbone is not None:
        backbone = Backbone(options.backbone, options.model_args or {})
    elif options.model_args is not None:
        backbone = replace(backbone, model_args=backbone.model_args | options.model_args)
    model = backbone.build_outline()
    why = "as asked for"
    if options.backbone is None:
        why = "the default on a GPU" if on_gpu else "the default on a CPU; on a GPU it is ViT-L/16"
    patch = tuple(model.patch_embed.patch_size)
    arguments = f" {json.dumps(backbone.model_args)}" if backbone.model_args else ""
    notes = [
        f"backbone {backbone.name}{arguments}, {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, "
        f"patch {patch[0]} ({why})"
    ]
    dtype, reason = options.dtype, "as asked for"
    if dtype == "auto" and options.protocol == "paper":
        dtype, reason = "float32", "the protocol's"
    elif dtype == "auto":
        pays = on_gpu or bfloat16_pays_on_cpu()
        dtype = "bfloat16" if pays else "float32"
        reason = "the protocol's" if pays else "this CPU has no fast bfloat16"
    notes.append(f"protocol {options.protocol}, batch {options.batch}, {dtype} ({reason})")
    compile_mode = options.compile
    if compile_mode == "auto" and options.protocol == "paper":
        compile_mode = "off"
    settings = Settings(
        backbone=backbone,
        outline=model,
        device=device,
        protocol=options.protocol,
        dtype=dtype,
        batch=options.batch,
        mechanisms=tuple(name for name in MECHANISMS if name in options.mechanisms),
        most_rounds=options.rounds,
        compile=compile_mode,
        sdpa=options.sdpa,
    )
    return settings, notes


def pick_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch finds no GPU")
    return torch.device(name, torch.cuda.current_device()) if name == "cuda" else torch.device(name)


def image_sizes(settings: Settings, resolutions: Sequence[int], notes: list[str]) -> list[tuple[int, int]]:
    """Sizes that the patch divides, in ascending order; rounding is noted."""
    sizes = []
    for res in sorted(set(resolutions)):
        size = rounded_size(res, settings.patch_size)
        if size != (res, res):
            patch = settings.patch_size
            notes.append(f"{res} px is not divisible by the patch of {patch[0]} px: rounded down to {size[0]} px")
        if size not in sizes:
            sizes.append(size)
    return sizes
