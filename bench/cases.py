"""What the bench measures: backbones, mechanisms with their options, and the gate before the clock.

Shapes: B batch, H heads, N tokens, d head dim, D embed dim, M features.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from adala.attention import TokenLayout, TokenMixer, mechanism_names
from adala.attention.softmax import SoftmaxMixer
from adala.backbones import build_backbone
from adala.families import Backbone
from adala.students import linearize, linearized_blocks

NONE = "none"
SOFTMAX = "softmax"
UNFUSED = "unfused"
OUT_OF_MEMORY = "out of memory"
LINEAR_MECHANISMS = ("linear", "hedgehog", "lolcats", "linformer", "performer", "cosformer", "nystromformer", "monarch")
MECHANISMS = (SOFTMAX, *LINEAR_MECHANISMS, NONE)
# What the paper's table was measured with; every other option is the mechanism's default.
PAPER_OPTIONS: dict[str, dict[str, Any]] = {
    "linformer": {"num_landmarks": 32},
    "performer": {"num_features": 64},
    "nystromformer": {"num_landmarks": 64},
    "monarch": {"num_steps": 3, "block_size": 32},
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# rms(reference - out) / rms(reference), over all sampled rows. Inside, every mechanism computes in float32, so that
# half precision shows in the rounding of the output alone (1.7e-3 for bfloat16), or, for softmax, in that of the
# weights (2e-3); in float32 the largest on a CPU is Performer's, 1e-6.
GATE_TOLERANCE = {torch.float32: 3e-5, torch.bfloat16: 6e-3, torch.float16: 1e-3}
# One wrong token among thousands hardly moves an average: the worst row may be so many times worse than the whole.
WORST_ROW_FACTOR = 10.0
GATE_ROWS = 256
# One of them is divisible by every patch size up to 16, and by 18, 20, 24, 28, 32.
OUTLINE_SIDES = (224, 720, 143)
# Entries of the largest intermediate that a reference may build at a time for the rows it is asked for.
REFERENCE_ENTRIES = 2**24


@dataclass(frozen=True)
class Case:
    """One mechanism in one backbone on images of one size.

    Attributes:
        backbone: timm name of the ViT around it, which is built without a head.
        mechanism: A mechanism's name, or ``none``: values are passed through, the ceiling for all others.
        image_size: Height and width in pixels.
        batch: Images of one forward pass.
        softmax: Backend of PyTorch's fused attention that softmax is pinned to, or ``unfused``: three operations and
            an N x N matrix.
    """

    backbone: str
    model_args: dict[str, Any] = field(default_factory=dict)
    mechanism: str = SOFTMAX
    image_size: tuple[int, int] = (224, 224)
    options: dict[str, Any] = field(default_factory=dict)
    batch: int = 1
    dtype: str = "float32"
    softmax: str | None = None

    @property
    def pinned_backend(self) -> str | None:
        """The backend that a forward pass of this case is pinned to; None where there is nothing to pin."""
        return self.softmax if self.mechanism == SOFTMAX and self.softmax != UNFUSED else None

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    def build_backbone(self) -> Backbone:
        return build_backbone(self.backbone, self.image_size, self.model_args)


def build_outline(case: Case) -> Backbone:
    """The backbone without memory for its weights, at some size that its patch divides, to read dimensions from.

    Raises:
        ValueError: timm knows no such network, or it is not a plain ViT.
    """
    *sides, last = OUTLINE_SIDES
    with torch.device("meta"):
        for side in sides:
            try:
                return replace(case, image_size=(side, side)).build_backbone()
            except ValueError as error:
                if "patch size" not in str(error):
                    raise
        return replace(case, image_size=(last, last)).build_backbone()


def num_tokens(model: Backbone, image_size: tuple[int, int]) -> int:
    patches = [size // patch for size, patch in zip(image_size, model.patch_embed.patch_size, strict=True)]
    return patches[0] * patches[1] + model.num_prefix_tokens


def known_mechanisms() -> list[str]:
    """In the order of the rows: the bench's own, and ahead of ``none`` what other packages have registered."""
    return [*MECHANISMS[:-1], *(name for name in mechanism_names() if name not in MECHANISMS), NONE]


class PassThroughMixer(TokenMixer):
    """No mixing at all: the values. What a network costs without its attention, which no mechanism can undercut."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout) -> Tensor:
        return v

    def reference(self, q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout, heads: slice = slice(None)) -> Tensor:
        return v


class UnfusedSoftmaxMixer(SoftmaxMixer):
    """softmax(d^-1/2 q k^T) v in three operations with the N x N matrix in memory, in the input's dtype."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout) -> Tensor:
        return (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(dim=-1) @ v


def build_model(case: Case, backbone: Backbone | None = None) -> Backbone:
    """The network of a case in eval mode, its attention replaced by the mechanism.

    It is made from ``backbone``, or from one with timm's random weights in float32.
    """
    unfused = case.mechanism == SOFTMAX and case.softmax == UNFUSED
    replacement = PassThroughMixer if case.mechanism == NONE else UnfusedSoftmaxMixer if unfused else None
    mechanism = "linear" if case.mechanism == NONE else case.mechanism
    student = linearize(case.build_backbone() if backbone is None else backbone, mechanism, options=case.options)
    for shell in linearized_blocks(student).values() if replacement else ():
        shell.token_mixer = replacement(shell.token_mixer.shape)
    return student.eval().requires_grad_(False)


@torch.no_grad()
def randomize(backbone: Backbone) -> None:
    """Gives a fresh network weights under which attention does something: times do not depend on it, the gate does.

    timm's own initialisation makes scores so small that every map is uniform, and LayerScale at 1e-5 hides what
    attention says from every later layer.
    """
    generator = torch.Generator().manual_seed(0)
    for name, parameter in backbone.named_parameters():
        if name.endswith(("attn.qkv.weight", "attn.q_proj.weight", "attn.k_proj.weight", "attn.v_proj.weight")):
            parameter.normal_(std=parameter.shape[1] ** -0.5, generator=generator)
        elif name.endswith(("ls1.gamma", "ls2.gamma", "gamma_1", "gamma_2")):
            parameter.fill_(1.0)


def share_weights(student: Backbone, backbone: Backbone) -> None:
    """Makes the student use the very parameters of the backbone it was made from; its mixers keep their own."""
    ours = dict(student.named_modules())
    for path, module in backbone.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            ours[path]._parameters[name] = parameter


def make_images(case: Case, device: torch.device) -> Tensor:
    """The bench input, (B, 3, height, width), the same for every mechanism."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(case.batch, 3, *case.image_size, generator=generator)
    return images.to(device, case.torch_dtype)


@dataclass(frozen=True)
class Gate:
    """Whether a fast path computes what its reference says.

    Attributes:
        error: rms(reference - out) / rms(reference).
        worst_row: The same for the single token that is furthest off.
        tolerance: Largest permitted ``error``; ``worst_row`` may be :data:`WORST_ROW_FACTOR` times that.
    """

    error: float
    worst_row: float
    tolerance: float

    @property
    def green(self) -> bool:
        # Written so that NaN is red.
        return self.error <= self.tolerance and self.worst_row <= WORST_ROW_FACTOR * self.tolerance


@dataclass(frozen=True)
class MixerCall:
    """What went into a token mixer during a forward pass, and what came out; q, k, v and out (B, H, N, d)."""

    mixer: TokenMixer
    q: Tensor
    k: Tensor
    v: Tensor
    layout: TokenLayout
    out: Tensor


@torch.no_grad()
def capture_calls(model: Backbone, run: Callable[[], Any]) -> list[MixerCall]:
    """The first and the last block's mixing while ``run`` passes the bench input through ``model``."""
    shells = list(linearized_blocks(model).values())
    calls: list[MixerCall] = []

    def keep(mixer: TokenMixer, inputs: Sequence[Tensor], layout: TokenLayout, out: Tensor) -> None:
        # Copies: an operation in place or a captured graph would write over them later.
        calls.append(MixerCall(mixer, *(x.detach().clone() for x in inputs), layout, out.detach().clone()))

    def keep_packed(mixer: TokenMixer, qkv: Tensor, layout: TokenLayout) -> Tensor:
        # Once: the default of this method goes through the mixer's forward.
        before, out = len(calls), type(mixer).mix_packed(mixer, qkv, layout)
        if len(calls) == before:
            heads = out.unflatten(-1, qkv.shape[-2:]).transpose(1, 2)
            keep(mixer, qkv.permute(2, 0, 3, 1, 4).unbind(0), layout, heads)
        return out

    ends = {id(shell.token_mixer): shell.token_mixer for shell in (shells[0], shells[-1])}
    handles = [
        mixer.register_forward_hook(lambda mixer, inputs, out: keep(mixer, inputs[:3], inputs[3], out))
        for mixer in ends.values()
    ]
    for mixer in ends.values():
        mixer.mix_packed = partial(keep_packed, mixer)
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
        for mixer in ends.values():
            del mixer.mix_packed
    return calls


@torch.no_grad()
def check_call(call: MixerCall) -> Gate:
    """Compares one mixing with the mixer's own dense reference in float64.

    The last image of the batch; its first head, and the last one too where N is below 2048. Where rows are independent
    and N exceeds :data:`GATE_ROWS`, so many rows, the first and the last among them.
    """
    mixer, (num_heads, num_tokens) = call.mixer, call.q.shape[1:3]
    heads = slice(0, 1) if num_tokens >= 2048 else slice(0, None, max(1, num_heads - 1))
    q, k, v, out = (x[-1:, heads].cpu().double() for x in (call.q, call.k, call.v, call.out))
    parts = [q]
    if mixer.rows_are_independent:
        rows = _sampled_rows(num_tokens)
        at_a_time = max(1, REFERENCE_ENTRIES // (q.shape[1] * num_tokens * mixer.reference_width))
        out, parts = out[:, :, rows], q[:, :, rows].split(at_a_time, dim=-2)
    expected = torch.cat([mixer.reference(part, k, v, call.layout, heads) for part in parts], dim=-2)
    difference, scale = (out - expected).square().sum(-1), expected.square().sum(-1)  # (1, heads, rows)
    error = float((difference.sum() / scale.sum()).sqrt())
    worst_row = float((difference / scale.mean(-1, keepdim=True)).max().sqrt())
    return Gate(error, worst_row, GATE_TOLERANCE[call.v.dtype])


def _sampled_rows(num_tokens: int) -> Tensor:
    if num_tokens <= GATE_ROWS:
        return torch.arange(num_tokens)
    drawn = torch.randperm(num_tokens - 2, generator=torch.Generator().manual_seed(0))[: GATE_ROWS - 2] + 1
    return torch.cat((torch.tensor([0, num_tokens - 1]), drawn)).sort().values


def run_gate(model: Backbone, run: Callable[[], Any]) -> Gate:
    """The gate over the mixings that ``run`` causes in the first and last block of ``model``; the worse one is told."""
    gates = [check_call(call) for call in capture_calls(model, run)]
    return next((gate for gate in gates if not gate.green), max(gates, key=lambda gate: gate.error))


class CaseFailed(RuntimeError):
    """A case has no result, for a reason that the bench knows; ``kind`` is the row's ``error_kind``."""

    def __init__(self, message: str, kind: str):
        super().__init__(message)
        self.kind = kind


def failure(error: BaseException) -> tuple[str, str]:
    """The ``error`` and ``error_kind`` of a row: an exception as one sentence, and what kind it is.

    Out of memory are CUDA's exception, Python's, and that of PyTorch's CPU allocator.
    """
    if isinstance(error, CaseFailed):
        return str(error), error.kind
    message, name = " ".join(str(error).split()), type(error).__name__
    said = any(words in message for words in ("can't allocate memory", "not enough memory", "out of memory"))
    out_of_memory = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and said
    )
    return f"{name}: {message}" if message else name, OUT_OF_MEMORY if out_of_memory else "exception"
