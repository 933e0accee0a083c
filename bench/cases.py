"""What the bench measures: backbones, mechanisms with their options, their references, and the gate before the clock.

Shapes: B batch, H heads, N tokens, d head dim, D embed dim, M features.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from adala.attention import TokenLayout, TokenMixer, resolve_mechanism
from adala.attention.linear import elu_attention_reference
from adala.attention.softmax import softmax_attention_reference
from adala.backbones import build_backbone
from adala.students import linearize, linearized_blocks
from baselines.cosformer import cosformer_reference
from baselines.hedgehog import hedgehog_reference
from baselines.linformer import linformer_reference
from baselines.monarch import monarch_reference
from baselines.nystromformer import nystromformer_reference
from baselines.performer import performer_reference

Protocol = Literal["paper", "best"]

NONE = "none"
SOFTMAX = "softmax"
UNFUSED = "unfused"
MECHANISMS = (
    SOFTMAX,
    "linear",
    "hedgehog",
    "lolcats",
    "linformer",
    "performer",
    "cosformer",
    "nystromformer",
    "monarch",
    NONE,
)
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
class Backbone:
    """A timm ViT without a head.

    Attributes:
        name: timm model name.
        model_args: Further arguments of timm's constructor.
    """

    name: str
    model_args: dict[str, Any] = field(default_factory=dict)

    def build(self, image_size: tuple[int, int]) -> VisionTransformer:
        return build_backbone(self.name, image_size, self.model_args)

    def build_outline(self) -> VisionTransformer:
        """The network without memory for its weights, at some size that its patch divides, to read dimensions from.

        Raises:
            ValueError: timm knows no such network, or it is not a plain ViT.
        """
        with torch.device("meta"):
            for side in OUTLINE_SIDES[:-1]:
                try:
                    return self.build((side, side))
                except ValueError as error:
                    if "patch size" not in str(error):
                        raise
            return self.build(OUTLINE_SIDES[-1:] * 2)


def default_backbone(device: torch.device) -> Backbone:
    """DINOv2-style (LayerScale, no head): ViT-L/16 on a GPU, ViT-S/16 on a CPU."""
    name = "vit_large_patch16_224" if device.type == "cuda" else "vit_small_patch16_224"
    return Backbone(name, {"init_values": 1e-5})


@dataclass(frozen=True)
class Case:
    """One mechanism in one backbone on images of one size.

    Attributes:
        backbone: The network around it.
        mechanism: A mechanism's name, or ``none``: values are passed through, the ceiling for all others.
        image_size: Height and width in pixels.
        options: Options of the mechanism by field name.
        batch: Images of one forward pass.
        dtype: Name of the dtype of weights and activations.
        softmax: Backend of PyTorch's fused attention that softmax is pinned to, or ``unfused``: three operations and
            an N x N matrix.
    """

    backbone: Backbone
    mechanism: str
    image_size: tuple[int, int]
    options: dict[str, Any]
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

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Case":
        values = json.loads(text)
        backbone = Backbone(**values.pop("backbone"))
        return cls(backbone=backbone, image_size=tuple(values.pop("image_size")), **values)


def mechanism_options(mechanism: str, protocol: Protocol) -> dict[str, Any]:
    return dict(PAPER_OPTIONS.get(mechanism, {})) if protocol == "paper" else {}


def check_mechanisms(names: list[str]) -> None:
    """Refuses what the bench has no reference for.

    Raises:
        ValueError: Names the first unknown one; the message lists those there are.
    """
    unknown = [name for name in names if name not in MECHANISMS]
    if unknown:
        raise ValueError(f"--mechanisms {unknown[0]}: the bench has {', '.join(MECHANISMS)}")


def rounded_size(res: int, patch_size: tuple[int, int]) -> tuple[int, int]:
    """Height and width that the patch divides, at most ``res``.

    Raises:
        ValueError: Not even one patch fits.
    """
    size = tuple(res // patch * patch for patch in patch_size)
    if min(size) < 1:
        raise ValueError(f"--res {res}: smaller than one patch of {patch_size[0]} x {patch_size[1]}")
    return size


class PassThroughMixer(TokenMixer):
    """No mixing at all: the values. What a network costs without its attention, which no mechanism can undercut."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout) -> Tensor:
        return v


class UnfusedSoftmaxMixer(TokenMixer):
    """softmax(d^-1/2 q k^T) v in three operations with the N x N matrix in memory, in the input's dtype."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout) -> Tensor:
        return (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(dim=-1) @ v


def build_model(case: Case, backbone: VisionTransformer | None = None) -> VisionTransformer:
    """The network of a case in eval mode, its attention replaced by the mechanism.

    Args:
        case: What to build.
        backbone: The softmax network to start from; None builds one with random weights, in float32.
    """
    backbone = case.backbone.build(case.image_size) if backbone is None else backbone
    stand_in = case.mechanism == NONE
    student = linearize(backbone, "linear" if stand_in else case.mechanism, options=case.options)
    replacement = PassThroughMixer if stand_in else None
    if case.mechanism == SOFTMAX and case.softmax == UNFUSED:
        replacement = UnfusedSoftmaxMixer
    for shell in linearized_blocks(student).values() if replacement else ():
        shell.token_mixer = replacement(shell.token_mixer.shape)
    return student.eval().requires_grad_(False)


@torch.no_grad()
def randomize(backbone: VisionTransformer, seed: int = 0) -> None:
    """Gives a fresh network weights under which attention does something: times do not depend on it, the gate does.

    timm's own initialisation makes scores so small that every map is uniform, and LayerScale at 1e-5 hides what
    attention says from every later layer.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in backbone.named_parameters():
        if name.endswith("attn.qkv.weight"):
            parameter.normal_(std=parameter.shape[1] ** -0.5, generator=generator)
        elif name.endswith(("ls1.gamma", "ls2.gamma")):
            parameter.fill_(1.0)


def share_weights(student: VisionTransformer, backbone: VisionTransformer) -> None:
    """Makes the student use the very parameters of the backbone it was made from; its mixers keep their own."""
    ours = dict(student.named_modules())
    for path, module in backbone.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            ours[path]._parameters[name] = parameter


def make_images(case: Case, device: torch.device, seed: int = 0) -> Tensor:
    """The bench input, (B, 3, height, width), the same for every mechanism."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(case.batch, 3, *case.image_size, generator=generator)
    return images.to(device, case.torch_dtype)


# (mixer, heads, q, k, v, layout) with q, k, v of the chosen heads in float64 on the CPU -> output of the same shape.
Reference = Callable[[TokenMixer, slice, Tensor, Tensor, Tensor, TokenLayout], Tensor]


@dataclass(frozen=True)
class ReferenceEntry:
    """The dense formula behind a mechanism.

    Attributes:
        compute: Calls the ``*_reference`` beside the mixer.
        by_rows: Whether a row of the output depends on its own query alone, so that a sample of queries is enough.
        width: Entries that the reference builds for one pair of tokens.
    """

    compute: Reference
    by_rows: bool = False
    width: Callable[[TokenMixer], int] = lambda mixer: 1


def _hedgehog(mixer, heads, q, k, v, layout):
    key_weight = mixer.query_weight if mixer.key_weight is None else mixer.key_weight
    weights = (weight[heads].cpu().double() for weight in (mixer.query_weight, key_weight))
    return hedgehog_reference(q, k, v, *weights, mixer.options)


def _linformer(mixer, heads, q, k, v, layout):
    projections = (p.cpu().double() for p in (mixer.key_projection, mixer.value_projection))
    return linformer_reference(q, k, v, *projections, mixer.options.scale)


def _nystromformer(mixer, heads, q, k, v, layout):
    if q.shape[-2] <= mixer.options.num_landmarks:
        return softmax_attention_reference(q, k, v)
    conv_weight = None if mixer.conv_weight is None else mixer.conv_weight[heads].cpu().double()
    return nystromformer_reference(q, k, v, mixer.options, conv_weight)


REFERENCES: dict[str, ReferenceEntry] = {
    SOFTMAX: ReferenceEntry(lambda m, h, q, k, v, t: softmax_attention_reference(q, k, v), by_rows=True),
    "linear": ReferenceEntry(
        lambda m, h, q, k, v, t: elu_attention_reference(q, k, v, m.options.den_added), by_rows=True
    ),
    "hedgehog": ReferenceEntry(_hedgehog, by_rows=True),
    "lolcats": ReferenceEntry(_hedgehog, by_rows=True),
    "linformer": ReferenceEntry(_linformer),
    "performer": ReferenceEntry(
        lambda m, h, q, k, v, t: performer_reference(q, k, v, m.projection.cpu().double(), m.options),
        by_rows=True,
        width=lambda m: m.options.num_features,
    ),
    "cosformer": ReferenceEntry(lambda m, h, q, k, v, t: cosformer_reference(q, k, v, t, m.options)),
    "nystromformer": ReferenceEntry(_nystromformer),
    "monarch": ReferenceEntry(
        lambda m, h, q, k, v, t: monarch_reference(q, k, v, m.options.block_size or t.grid_size[1], m.options)
    ),
    NONE: ReferenceEntry(lambda m, h, q, k, v, t: v),
}


@dataclass(frozen=True)
class Gate:
    """Whether a fast path computes what its reference says.

    Attributes:
        green: Whether both errors are within their tolerance.
        error: rms(reference - out) / rms(reference).
        worst_row: The same for the single token that is furthest off.
        tolerance: Largest permitted ``error``; ``worst_row`` may be :data:`WORST_ROW_FACTOR` times that.
    """

    green: bool
    error: float
    worst_row: float
    tolerance: float


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
def capture_calls(model: VisionTransformer, run: Callable[[], Any]) -> list[MixerCall]:
    """The first and the last block's mixing while ``run`` passes the bench input through ``model``."""
    shells = list(linearized_blocks(model).values())
    calls: list[MixerCall] = []

    def keep(mixer: TokenMixer, inputs: tuple, out: Tensor) -> None:
        # Copies: an operation in place or a captured graph would write over them later.
        q, k, v = (x.detach().clone() for x in inputs[:3])
        calls.append(MixerCall(mixer, q, k, v, inputs[3], out.detach().clone()))

    ends = {id(shell.token_mixer): shell.token_mixer for shell in (shells[0], shells[-1])}
    handles = [mixer.register_forward_hook(keep) for mixer in ends.values()]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return calls


@torch.no_grad()
def check_call(mechanism: str, call: MixerCall) -> Gate:
    """Compares one mixing with the mechanism's dense reference in float64.

    The last image of the batch; its first head, and the last one too where N is below 2048. Where a reference goes row
    by row and N exceeds :data:`GATE_ROWS`, so many rows, the first and the last among them.
    """
    entry, num_tokens = REFERENCES[mechanism], call.q.shape[-2]
    picked = [0] if num_tokens >= 2048 or call.q.shape[1] == 1 else [0, call.q.shape[1] - 1]
    squared_error, squared_reference, worst = 0.0, 0.0, []
    for head in picked:
        heads = slice(head, head + 1)
        q, k, v, out = (x[-1:, heads].cpu().double() for x in (call.q, call.k, call.v, call.out))
        rows = _sampled_rows(num_tokens) if entry.by_rows else torch.arange(num_tokens)
        expected = _reference_rows(entry, call, heads, q, k, v, rows)
        difference = (out[..., rows, :] - expected).square().sum(-1)
        scale = expected.square().sum(-1).mean()
        squared_error += float(difference.sum())
        squared_reference += float(expected.square().sum())
        worst.append(float((difference / scale).max().sqrt()))
    error = (squared_error / squared_reference) ** 0.5 if squared_reference else squared_error
    tolerance = GATE_TOLERANCE[call.v.dtype]
    # Written so that NaN is red.
    green = error <= tolerance and all(row <= WORST_ROW_FACTOR * tolerance for row in worst)
    return Gate(green, error, max(worst), tolerance)


def _reference_rows(
    entry: ReferenceEntry, call: MixerCall, heads: slice, q: Tensor, k: Tensor, v: Tensor, rows: Tensor
) -> Tensor:
    if not entry.by_rows:
        return entry.compute(call.mixer, heads, q, k, v, call.layout)
    at_a_time = max(1, REFERENCE_ENTRIES // (k.shape[-2] * entry.width(call.mixer)))
    parts = [
        entry.compute(call.mixer, heads, q[..., part, :], k, v, call.layout) for part in rows.split(at_a_time)
    ]  # fmt: skip
    return torch.cat(parts, dim=-2)


def _sampled_rows(num_tokens: int) -> Tensor:
    if num_tokens <= GATE_ROWS:
        return torch.arange(num_tokens)
    drawn = torch.randperm(num_tokens - 2, generator=torch.Generator().manual_seed(0))[: GATE_ROWS - 2] + 1
    return torch.cat((torch.tensor([0, num_tokens - 1]), drawn)).sort().values


def run_gate(mechanism: str, model: VisionTransformer, run: Callable[[], Any]) -> Gate:
    """The gate over the mixings that ``run`` causes in the first and last block of ``model``; the worse one is told."""
    calls = capture_calls(model, run)
    gates = [check_call(mechanism, call) for call in calls]
    return next((gate for gate in gates if not gate.green), max(gates, key=lambda gate: gate.error))


def resolved_options(mechanism: str, options: Mapping[str, Any]) -> Any:
    """The options dataclass of a mechanism, defaults filled in."""
    return None if mechanism == NONE else resolve_mechanism(mechanism).Options(**options)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out: CUDA's, Python's, or that of PyTorch's CPU allocator."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and (
        "can't allocate memory" in str(error) or "not enough memory" in str(error) or "out of memory" in str(error)
    )


def describe_error(error: BaseException) -> str:
    """An exception as one sentence."""
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message}" if message else type(error).__name__
