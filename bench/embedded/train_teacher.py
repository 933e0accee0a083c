"""Trains the embedded softmax teacher from scratch on the embedded slice and records its held-out top-1.

    python bench/embedded/train_teacher.py

About 20 minutes on one CPU core. Plain PyTorch on purpose: the teacher is what the project adapts, not its product.
Most epochs see the images at half their size (49 patches instead of 196, the position embedding resampled), which is
five times cheaper; the last ones see them at 28 px. The held-out split is used once, at the end.
"""

import argparse
import json
import math
import platform

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.layers import build_sincos2d_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from adala.data.embedded import TEACHER_PATH, load_split

ARCHITECTURE = "vit_tiny_patch16_224"
MODEL_ARGS = {"img_size": 28, "patch_size": 2, "embed_dim": 64, "depth": 6, "num_heads": 2}
# The classifier sees the mean of all tokens, class token included, after the final norm: every token learns.
TRAINING_ARGS = {"global_pool": "avg", "fc_norm": False, "pool_include_prefix": True, "dynamic_img_size": True}
MEAN, STD = 0.286, 0.353  # of the slice's training pixels, scaled to [0, 1]


def to_input(images: Tensor) -> Tensor:
    """(B, 28, 28) uint8 to (B, 3, 28, 28) normalised float: grey in all three channels, as an RGB reader gives it."""
    return ((images.float() / 255 - MEAN) / STD)[:, None].expand(-1, 3, -1, -1)


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shifts each image by up to two pixels and mirrors half of them, (B, 3, 28, 28) in and out."""
    batch, _, size, _ = images.shape
    shift = torch.randint(-2, 3, (batch, 2), generator=generator)
    padded = F.pad(images, (2, 2, 2, 2), value=-MEAN / STD)
    rows = torch.arange(size)[None] + 2 + shift[:, :1]
    columns = torch.arange(size)[None] + 2 + shift[:, 1:]
    mirrored = torch.rand(batch, 1, generator=generator) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    index = torch.arange(batch)[:, None, None]
    return padded.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


@torch.no_grad()
def initialise(model: VisionTransformer) -> None:
    """Starts attention out local, as trained ViTs end up: otherwise tiny data and 2 x 2 patches take far longer.

    Sinusoidal positions, W_q W_k^T near the identity, W_v W_proj near its negative (mimetic initialisation).

    Paper: arXiv 2305.09828, section 4.
    """
    dim, grid = model.embed_dim, model.patch_embed.grid_size
    model.pos_embed[0, model.num_prefix_tokens :] = build_sincos2d_pos_embed(grid, dim, temperature=100.0)
    for block in model.blocks:
        attention = block.attn
        q, k, v = attention.qkv.weight.chunk(3)
        for head in range(attention.num_heads):
            rows = slice(head * attention.head_dim, (head + 1) * attention.head_dim)
            u, scale, vt = torch.linalg.svd(0.7 * torch.randn(dim, dim) / dim**0.5 + 0.7 * torch.eye(dim))
            root = scale[: attention.head_dim, None].sqrt()
            q[rows], k[rows] = root * u.T[: attention.head_dim], root * vt[: attention.head_dim]
        u, scale, vt = torch.linalg.svd(0.4 * torch.randn(dim, dim) / dim**0.5 - 0.4 * torch.eye(dim))
        v.copy_(scale.sqrt()[:, None] * vt)
        attention.proj.weight.copy_(u * scale.sqrt())


@torch.no_grad()
def top1_percent(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    model.eval()
    predicted = torch.cat([model(to_input(chunk)).argmax(1) for chunk in images.split(256)])
    return 100 * (predicted == labels).float().mean().item()


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int, size: int, batch_size: int, lr: float) -> None:
    """AdamW over ``epochs`` at ``size`` pixels, rate ``lr`` warmed up over half an epoch and annealed to zero."""
    generator = torch.Generator().manual_seed(size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05, betas=(0.9, 0.98))
    steps_per_epoch = len(images) // batch_size
    total, warmup = epochs * steps_per_epoch, steps_per_epoch // 2
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / warmup, 0.5 * (1 + math.cos(math.pi * min(i / total, 1))))
    )
    model.train()
    for epoch in range(epochs):
        correct = 0
        order = torch.randperm(len(images), generator=generator)[: steps_per_epoch * batch_size]
        for chunk in order.split(batch_size):
            inputs = augment(to_input(images[chunk]), generator)
            inputs = F.interpolate(inputs, size=(size, size), mode="area") if size != 28 else inputs
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(inputs).float()
            optimizer.zero_grad()
            F.cross_entropy(logits, labels[chunk]).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            correct += (logits.argmax(1) == labels[chunk]).sum().item()
        print(f"{size} px, epoch {epoch + 1}/{epochs}: training top-1 {100 * correct / len(order):.2f} %", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small-epochs", type=int, default=14, help="epochs at 14 px")
    parser.add_argument("--full-epochs", type=int, default=6, help="epochs at 28 px")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1.5e-3, help="AdamW peak rate; at 28 px a third of it")
    args = parser.parse_args()
    torch.manual_seed(0)
    (images, labels), held_out = (map(torch.from_numpy, load_split(split)) for split in ("train", "val"))
    model = timm.create_model(ARCHITECTURE, num_classes=10, weight_init="jax", **MODEL_ARGS, **TRAINING_ARGS)
    initialise(model)
    labels = labels.long()
    train(model, images, labels, args.small_epochs, 14, args.batch_size, args.lr)
    train(model, images, labels, args.full_epochs, 28, args.batch_size, args.lr / 3)
    top1 = top1_percent(model, *held_out)
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, TEACHER_PATH)
    record = {
        "architecture": ARCHITECTURE,
        "model_args": MODEL_ARGS,
        "held_out_top1": round(top1, 2),
        "epochs": {"14 px": args.small_epochs, "28 px": args.full_epochs},
        "torch": torch.__version__,
        "timm": timm.__version__,
        "machine": platform.processor() or platform.machine(),
    }
    TEACHER_PATH.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"held-out top-1 {top1:.2f} %, {TEACHER_PATH.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
