"""What a bench run was asked for and under which conditions, with everything that depends on the device filled in."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import cases
import timing
import torch
from allocator import keep_freed_memory, use_huge_pages

from adala.families import Backbone
from adala.machine import machine_description

ImageSize = tuple[int, int]  # height and width in pixels


@dataclass(frozen=True)
class Settings:
    """What the command line asks for, with everything that depends on the device filled in.

    Attributes:
        network: Backbone, batch and dtype of every case.
        outline: The backbone without memory for its weights.
        mechanisms: In the order of the rows.
        notes: What was chosen, and why; the first says which network.
        softmax: By image size, what softmax attention is computed by; see :meth:`softmax_at`.
    """

    options: argparse.Namespace
    device: torch.device
    network: cases.Case
    outline: Backbone
    mechanisms: tuple[str, ...]
    notes: list[str]
    softmax: dict[ImageSize, str] = field(default_factory=dict)

    @property
    def patch_size(self) -> tuple[int, int]:
        return tuple(self.outline.patch_embed.patch_size)

    @property
    def compile(self) -> str:
        """``auto``, ``on`` or ``off``."""
        paper = self.options.protocol == "paper"
        return "off" if paper and self.options.compile == "auto" else self.options.compile

    def softmax_at(self, image_size: ImageSize) -> str:
        """``unfused``, the backend asked for, or whichever is fastest at this size, found out once."""
        if self.options.protocol == "paper":
            return cases.UNFUSED
        if self.options.sdpa != "auto":
            return self.options.sdpa
        if image_size not in self.softmax:
            attention, tokens = self.outline.blocks[0].attn, cases.num_tokens(self.outline, image_size)
            shape = (self.network.batch, tokens, 3, attention.num_heads, attention.head_dim)
            packed = torch.randn(shape, generator=torch.Generator().manual_seed(0))
            q, k, v = packed.to(self.device, self.network.torch_dtype).permute(2, 0, 3, 1, 4).unbind(0)
            self.softmax[image_size] = timing.fastest_sdpa_backend(q, k, v)
        return self.softmax[image_size]

    def case(self, mechanism: str, image_size: ImageSize) -> cases.Case:
        softmax = self.softmax_at(image_size) if mechanism == cases.SOFTMAX else None
        options = cases.PAPER_OPTIONS.get(mechanism, {}) if self.options.protocol == "paper" else {}
        return replace(self.network, mechanism=mechanism, image_size=image_size, options=options, softmax=softmax)

    def image_sizes(self, resolutions: Sequence[int]) -> list[ImageSize]:
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
    known = cases.known_mechanisms()
    unknown = [name for name in options.mechanisms if name not in known]
    if unknown:
        raise ValueError(f"--mechanisms {unknown[0]}: the bench has {', '.join(known)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch finds no GPU")
    on_gpu, paper = options.device != "cpu" and torch.cuda.is_available(), options.protocol == "paper"
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    # DINOv2-style: with LayerScale.
    default, model_args = "vit_large_patch16_224" if on_gpu else "vit_small_patch16_224", {"init_values": 1e-5}
    model_args = ({} if options.backbone else model_args) | (options.model_args or {})
    network = cases.Case(options.backbone or default, model_args, batch=options.batch)
    outline = cases.build_outline(network)
    why = "the default on a GPU" if on_gpu else "the default on a CPU; on a GPU it is ViT-L/16"
    arguments = f" {json.dumps(network.model_args)}" if network.model_args else ""
    notes = [
        f"backbone {network.backbone}{arguments}, {sum(p.numel() for p in outline.parameters()) / 1e6:.2f} M "
        f"parameters, patch {outline.patch_embed.patch_size[0]} ({'as asked for' if options.backbone else why})"
    ]
    dtype, reason = options.dtype, "as asked for"
    if dtype == "auto":
        pays = not paper and (on_gpu or timing.bfloat16_pays_on_cpu())
        dtype = "bfloat16" if pays else "float32"
        reason = "the protocol's" if pays or paper else "this CPU has no fast bfloat16"
    notes.append(f"protocol {options.protocol}, batch {options.batch}, {dtype} ({reason})")
    mechanisms = tuple(name for name in known if name in options.mechanisms)
    return Settings(options, device, replace(network, dtype=dtype), outline, mechanisms, notes)


def conditions(settings: Settings) -> dict[str, Any]:
    """What the numbers are measured under: ``machine`` of the schema. On a CPU the allocator is set here."""
    on_gpu, network = settings.device.type == "cuda", settings.network
    return {
        **machine_description(settings.device),
        "driver": timing.nvml(settings.device, "nvmlSystemGetDriverVersion"),
        **{name: getattr(network, name) for name in ("backbone", "model_args", "dtype", "batch")},
        "patch_size": list(settings.patch_size),
        "num_prefix_tokens": settings.outline.num_prefix_tokens,
        "protocol": settings.options.protocol,
        "tf32": False,
        "compile": settings.compile,
        "softmax": "fused" if settings.options.protocol == "best" else cases.UNFUSED,
        "time_budget_s": settings.options.time_budget_s,
        "freed_memory_kept": not on_gpu and keep_freed_memory(),
        "huge_pages": not on_gpu and use_huge_pages(),
    }
