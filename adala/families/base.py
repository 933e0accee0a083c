"""What a family of timm's models has to say of itself to be linearized: an adapter, and a student's common part.

Shapes: B batch, N tokens, D embed dim.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

from timm.layers import PatchEmbed, to_2tuple
from torch import Tensor, nn

from adala.attention import AttentionShape, AttentionShell, TokenLayout, TokenMixer, layout_of_image


class Backbone(Protocol):
    """What is read of a teacher and of its students, which are timm's models and ``nn.Module``s.

    Attributes:
        embed_dim: D.
        num_prefix_tokens: Tokens before the patches, the class token first where there is one.
        has_class_token: Whether token 0 is a class token.
        patch_embed: With ``patch_size``, ``grid_size``, ``img_size`` and ``proj``, one convolution.
        blocks: Each with its attention as ``attn``.
    """

    embed_dim: int
    num_prefix_tokens: int
    has_class_token: bool
    patch_embed: nn.Module
    blocks: nn.ModuleList | nn.Sequential

    def __call__(self, images: Tensor) -> Tensor:
        """Features of all tokens after the final norm, (B, N, D), of images (B, 3, height, width)."""


class LinearizedModel:
    """The part of a student that is alike in all families: its blocks are told how the tokens of each image lie.

    timm's blocks get tokens only. What they pass on untouched is ``attn_mask``, which linearized attention has no use
    for: the layout travels under that name. In all else a student is timm's own model.
    """

    def token_layout(self, images: Tensor) -> TokenLayout:
        """The layout of the tokens of ``images`` (B, 3, height, width)."""
        return token_layout(self, images)

    def positions(self, images: Tensor) -> list[dict[str, Any]]:
        """What each block's attention is told of positions beside the layout, by argument: a rotary embedding, say.

        Args:
            images: (B, 3, height, width).
        """
        return [{} for _ in self.blocks]

    def forward_features(self, x: Tensor, attn_mask: None = None, is_causal: bool = False) -> Tensor:
        """The final norm's output for all tokens, (B, N, D), of images (B, 3, height, width).

        Raises:
            ValueError: A mask is given.
        """
        refuse_mask(attn_mask, is_causal)
        return super().forward_features(x, attn_mask=self.token_layout(x))

    def forward_intermediates(
        self, x: Tensor, *args: Any, attn_mask: None = None, is_causal: bool = False, **kwargs: Any
    ) -> Any:
        """timm's, over all its options but masks.

        Raises:
            ValueError: A mask is given.
        """
        refuse_mask(attn_mask, is_causal)
        return super().forward_intermediates(x, *args, attn_mask=self.token_layout(x), **kwargs)

    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | tuple[int, int] | None = None
    ) -> None:
        """timm's; the mixers are told of the new grid, too, and what they hold for each token is resampled to it.

        Raises:
            ValueError: An image size that the patch size does not divide.
        """
        size, patch = img_size or self.patch_embed.img_size, patch_size or self.patch_embed.patch_size
        check_divisible(to_2tuple(size), to_2tuple(patch))
        super().set_input_size(None if img_size is None else to_2tuple(img_size), patch_size)
        layout = usual_layout(self)
        for attention in linearized_blocks(self).values():
            if attention.token_mixer.shape.layout != layout:
                attention.token_mixer.resize(layout)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """timm's switch. The blocks do it: the layout is an argument of what is computed again."""
        super().set_grad_checkpointing(enable)
        for block in self.blocks:
            block.grad_checkpointing = enable


class Family:
    """An adapter: how models of one class of timm's become teachers and students.

    A subclass sets what is listed here and overrides the methods in which its models differ; its instances hold
    nothing. ``adala.families`` finds it by name.

    Attributes:
        model_class: timm's class. Only it itself is taken: a subclass may mean other tokens, another output or another
            attention (a convolutional stem, windows, differences of two maps, a shared projection).
        backbone_class: What :meth:`make_backbone` makes of it where that is another class.
        student_class: :class:`LinearizedModel` and ``model_class``.
        modules: Modules of timm whose names are of this family, before a model is built.
        blocks: For each class of timm's blocks, that of a student's.
        shells: For each class of timm's attention, what takes it apart.
        tokens: What its prefix tokens are, in words.
    """

    model_class: ClassVar[type[nn.Module]]
    backbone_class: ClassVar[type[nn.Module] | None] = None
    student_class: ClassVar[type]
    modules: ClassVar[tuple[str, ...]] = ()
    blocks: ClassVar[Mapping[type, type]]
    shells: ClassVar[Mapping[type, type[AttentionShell]]]
    tokens: ClassVar[str] = "a class token and registers"

    @property
    def name(self) -> str:
        return self.model_class.__name__

    def takes(self, model: nn.Module) -> bool:
        """Whether a model is of this family, linearizable or not."""
        return type(model) in (self.model_class, self.backbone_class)

    def check(self, model: nn.Module) -> None:
        """Refuses models of the family whose attention is not global self-attention of all tokens.

        Raises:
            ValueError: Names the module that is in the way and what it is.
        """
        self.check_patches(model)
        if not (model.patch_drop is None or isinstance(model.patch_drop, nn.Identity)):
            raise ValueError("patch_drop: models that drop patches are not supported; build it with patch_drop_rate=0")
        if len(model.blocks) == 0:
            raise ValueError("blocks: the model has none; build it with a depth of at least 1")
        for index, block in enumerate(model.blocks):
            self.check_block(f"blocks.{index}", block)

    def check_patches(self, model: nn.Module) -> None:
        """:meth:`check` of what makes patches of images.

        Raises:
            ValueError: See :meth:`check`.
        """
        if type(model.patch_embed) is not PatchEmbed:
            raise ValueError(
                f"patch_embed is a {type(model.patch_embed).__name__}; only timm's plain PatchEmbed, one convolution, "
                "is supported"
            )

    def check_block(self, name: str, block: nn.Module) -> None:
        """:meth:`check` of one block.

        Raises:
            ValueError: See :meth:`check`.
        """
        if type(block) not in self.blocks:
            raise ValueError(
                f"{name} is a {type(block).__name__}; only timm's plain {_names(self.blocks)} is supported"
            )
        if type(block.attn) not in self.shells:
            raise ValueError(
                f"{name}.attn is a {type(block.attn).__name__}; only timm's plain global {_names(self.shells)} is "
                "supported"
            )
        if block.attn.attn_drop.p > 0:
            raise ValueError(f"{name}.attn.attn_drop: dropout of attention weights is not supported; set it to 0")

    def constructor_arguments(self) -> list[str]:
        """Names of what timm's constructor takes; not its factory's arguments, which go past it."""
        return list(inspect.signature(self.model_class).parameters)

    def build_arguments(self, image_size: Sequence[int]) -> dict[str, Any]:
        """What timm's constructor is given for a model that takes several image sizes.

        Args:
            image_size: Height and width in pixels that the position embedding is resampled to once.
        """
        return {"img_size": tuple(image_size), "dynamic_img_size": True}

    def make_backbone(self, model: nn.Module, image_size: Sequence[int]) -> None:
        """Has ``model(images)`` give the final norm's output for all tokens, (B, N, D), from now on.

        Args:
            model: As timm built it, for ``image_size``.
            image_size: Height and width in pixels.
        """
        if isinstance(model.norm, nn.Identity):
            # Models that are pooled before their final norm: here it comes at its usual place, for all tokens.
            model.norm = model.fc_norm
        model.fc_norm = nn.Identity()
        model.reset_classifier(0, "")

    def read_state(self, tensors: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        """A checkpoint's tensors under the names of ``model``, position embeddings resampled to fit.

        Raises:
            ValueError: Weights that ``model`` would have to leave out.
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement read_state")

    def prepare_student(self, student: nn.Module) -> None:
        """Makes a student of a copy of a teacher, whose attention is still timm's."""
        student.__class__ = self.student_class
        checkpointing = student.grad_checkpointing
        for block in student.blocks:
            block.__class__ = self.blocks[type(block)]
            self.prepare_attention(block.attn)
        student.set_grad_checkpointing(checkpointing)

    def prepare_attention(self, attention: nn.Module) -> None:
        """Has an attention that stays timm's call its projections, which may have got adapters."""

    def wrap(
        self, attention: nn.Module, build: Callable[[AttentionShape], TokenMixer], layout: TokenLayout
    ) -> nn.Module:
        """A shell around a timm attention of the family.

        Args:
            attention: Whose submodules it takes over.
            build: From heads, their width and the layout to a token mixer.
            layout: Of the tokens at the model's own image size.
        """
        mixer = build(AttentionShape(attention.num_heads, attention.head_dim, layout)).to(attention.proj.weight)
        return self.shells[type(attention)](attention, mixer)


def _names(classes: Iterable[type]) -> str:
    return " or ".join(known.__name__ for known in classes)


def refuse_mask(attn_mask: Any, is_causal: bool) -> None:
    """Refuses masks, which no linearized model has a place for, with a ValueError."""
    if attn_mask is not None or is_causal:
        raise ValueError("masked or causal attention is not supported by linearized models: pass no attn_mask")


def token_layout(model: Backbone, images: Tensor) -> TokenLayout:
    """The layout of the tokens that ``model`` makes of ``images`` (B, 3, height, width)."""
    height, width = images.shape[-2:]
    return layout_of_image(height, width, tuple(model.patch_embed.patch_size), model.num_prefix_tokens)


def usual_layout(model: Backbone) -> TokenLayout:
    """The layout of the tokens at the model's own image size."""
    return TokenLayout(tuple(model.patch_embed.grid_size), model.num_prefix_tokens)


def linearized_blocks(student: LinearizedModel) -> dict[int, AttentionShell]:
    """The attention shells of a student by block number; blocks that were kept are left out."""
    return {i: block.attn for i, block in enumerate(student.blocks) if isinstance(block.attn, AttentionShell)}


def check_divisible(image_size: Sequence[int], patch_size: Sequence[int]) -> None:
    """Refuses an image size (height, width) that the patch size does not divide, with a ValueError."""
    if any(size % patch for size, patch in zip(image_size, patch_size, strict=True)):
        nearest = [max(patch, size // patch * patch) for size, patch in zip(image_size, patch_size, strict=True)]
        raise ValueError(
            f"image size {image_size[0]} x {image_size[1]} is not divisible by the patch size {patch_size[0]} x "
            f"{patch_size[1]}: {nearest[0]} x {nearest[1]} would be"
        )
