"""What a bench run was asked for, with everything that depends on the device filled in."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from cases import (
    SOFTMAX,
    UNFUSED,
    Case,
    build_outline,
    known_mechanisms,
    mechanism_options,
    num_tokens,
)
from timing import bfloat16_pays_on_cpu, fastest_sdpa_backend
from timm.models.vision_transformer import VisionTransformer


@dataclass(frozen=True)
class Settings:
    """What the command line asks for, with everything that depends on the device filled in.

    Attributes:
        network: Backbone, batch and dtype of every case.
        outline: The backbone without memory for its weights.
        device: Where everything runs.
        protocol: ``paper`` or ``best``.
        mechanisms: In the order of the rows.
        most_rounds: Largest number of timed rounds.
        compile: ``auto``, ``on`` or ``off``.
        sdpa: ``auto`` or the name of a backend.
        notes: What was chosen, and why; the first says which network.
        softmax: By image size, what softmax attention is computed by; see :meth:`softmax_at`.
    """

    network: Case
    outline: VisionTransformer
    device: torch.device
    protocol: str
    mechanisms: tuple[str, ...]
    most_rounds: int
    compile: str
    sdpa: str
    notes: list[str]
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
            attention, tokens = self.outline.blocks[0].attn, num_tokens(self.outline, image_size)
            shape = (self.network.batch, tokens, 3, attention.num_heads, attention.head_dim)
            packed = torch.randn(shape, generator=torch.Generator().manual_seed(0))
            q, k, v = packed.to(self.device, self.network.torch_dtype).permute(2, 0, 3, 1, 4).unbind(0)
            self.softmax[image_size] = fastest_sdpa_backend(q, k, v)
        return self.softmax[image_size]

    def case(self, mechanism: str, image_size: tuple[int, int]) -> Case:
        softmax = self.softmax_at(image_size) if mechanism == SOFTMAX else None
        options = mechanism_options(mechanism, self.protocol)
        return replace(self.network, mechanism=mechanism, image_size=image_size, options=options, softmax=softmax)

    def cases(self, image_size: tuple[int, int]) -> dict[str, Case]:
        return {mechanism: self.case(mechanism, image_size) for mechanism in self.mechanisms}

    def image_sizes(self, resolutions: Sequence[int]) -> list[tuple[int, int]]:
        """Sizes that the patch divides, in ascending order, without repetition; rounding down is noted.

        Raises:
            ValueError: Not even one patch fits.
        """
        sizes, (rows, columns) = [], self.patch_size
        for res in sorted(set(resolutions)):
            size = (res // rows * rows, res // columns * columns)
            if min(size) < 1:
                raise ValueError(f"--res {res}: smaller than one patch of {rows} x {columns}")
            if size != (res, res):
                self.notes.append(f"{res} px is not divisible by the patch of {rows} px: rounded down to {size[0]} px")
            sizes.append(size)
        return list(dict.fromkeys(sizes))


def build_settings(options: argparse.Namespace) -> Settings:
    """Fills in what depends on the device.

    Raises:
        ValueError: A mechanism that nobody has registered, a backbone that is none, or no GPU.
    """
    known = known_mechanisms()
    unknown = [name for name in options.mechanisms if name not in known]
    if unknown:
        raise ValueError(f"--mechanisms {unknown[0]}: the bench has {', '.join(known)}")
    device = pick_device(options.device)
    on_gpu, paper = device.type == "cuda", options.protocol == "paper"
    # DINOv2-style: with LayerScale.
    default, model_args = "vit_large_patch16_224" if on_gpu else "vit_small_patch16_224", {"init_values": 1e-5}
    model_args = ({} if options.backbone else model_args) | (options.model_args or {})
    network = Case(options.backbone or default, model_args, batch=options.batch)
    outline = build_outline(network)
    why = "the default on a GPU" if on_gpu else "the default on a CPU; on a GPU it is ViT-L/16"
    arguments = f" {json.dumps(network.model_args)}" if network.model_args else ""
    notes = [
        f"backbone {network.backbone}{arguments}, {sum(p.numel() for p in outline.parameters()) / 1e6:.2f} M "
        f"parameters, patch {outline.patch_embed.patch_size[0]} ({'as asked for' if options.backbone else why})"
    ]
    dtype, reason = options.dtype, "as asked for"
    if dtype == "auto":
        pays = not paper and (on_gpu or bfloat16_pays_on_cpu())
        dtype = "bfloat16" if pays else "float32"
        reason = "the protocol's" if pays or paper else "this CPU has no fast bfloat16"
    notes.append(f"protocol {options.protocol}, batch {options.batch}, {dtype} ({reason})")
    return Settings(
        network=replace(network, dtype=dtype),
        outline=outline,
        device=device,
        protocol=options.protocol,
        mechanisms=tuple(name for name in known if name in options.mechanisms),
        most_rounds=options.rounds,
        compile="off" if options.compile == "auto" and paper else options.compile,
        sdpa=options.sdpa,
        notes=notes,
    )


def pick_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch finds no GPU")
    return torch.device(name, torch.cuda.current_device()) if name == "cuda" else torch.device(name)
