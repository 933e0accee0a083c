"""Students as models of Hugging Face's transformers: a folder that AutoModel and AutoBackbone load.

    python -m adala.export runs/mine/stage2 --to hf --out my-student        # config, weights, model card
    AdalaBackbone.from_pretrained("my-student", out_features=["stage6", "stage12"])   # under DPT, UperNet, Mask2Former

Importing this module registers the classes with AutoConfig, AutoModel and AutoBackbone; the folder has a file that does
it where ``trust_remote_code`` is set. It needs the extra ``hf``. (AutoBackbone.from_pretrained of transformers 5.24
reads repositories of the hub only, not folders.)

Shapes: B batch, N tokens, D embed dim, h, w rows and columns of patches.
"""

import dataclasses
import json
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoBackbone, AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.backbone_utils import BackboneConfigMixin, BackboneMixin
from transformers.modeling_outputs import BackboneOutput, BaseModelOutputWithPooling

from adala.backbones import build_backbone
from adala.export.agreement import Model
from adala.export.folder import StudentDescription
from adala.files import write_json
from adala.students import LinearizedModel

MODEL_TYPE = "adala"
WEIGHTS = "model.safetensors"
REMOTE_CODE = "modeling_adala.py"
# Written into the folder. Names in a try statement are not asked for by transformers, whose sentence would not name
# the extra.
REMOTE_SOURCE = '''"""The classes of this model are in the package AdaLA."""

try:
    from adala.export.huggingface import AdalaBackbone, AdalaConfig, AdalaModel
except ImportError as error:
    raise ImportError("this model is a student of AdaLA, which is not installed: pip install 'adala[hf]'") from error
'''
AUTO_CLASSES = {"AutoConfig": "AdalaConfig", "AutoModel": "AdalaModel", "AutoBackbone": "AdalaBackbone"}


class AdalaConfig(BackboneConfigMixin, PretrainedConfig):
    """What a student is built from, and what a backbone gives of it.

    Attributes:
        student: Its description, see :class:`adala.export.StudentDescription`; without task.
        apply_layernorm: Whether feature maps pass the final norm.
        reshape_hidden_states: Whether feature maps are (B, D, h, w) of the patches, and not (B, N, D) of all tokens.
        stage_names: ``stem`` for the embedded patches, ``stage1`` and so on for what each block gives.
    """

    model_type = MODEL_TYPE

    def __init__(
        self,
        student: Mapping[str, Any] | None = None,
        apply_layernorm: bool = True,
        reshape_hidden_states: bool = True,
        out_features: list[str] | None = None,
        out_indices: list[int] | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.student = None if student is None else dict(student)
        self.apply_layernorm = apply_layernorm
        self.reshape_hidden_states = reshape_hidden_states
        if self.student is not None:
            # On the meta device: what others read of a configuration, from the model itself.
            with torch.device("meta"):
                model = _build(self.description)
            self.hidden_size, self.num_hidden_layers = model.embed_dim, len(model.blocks)
            self.num_attention_heads = model.blocks[0].attn.num_heads
            self.image_size = _one_if_square(self.description.image_size)
            self.patch_size = _one_if_square(model.patch_embed.patch_size)
            self.num_channels, self.num_prefix_tokens = 3, model.num_prefix_tokens
        depth = getattr(self, "num_hidden_layers", 0)
        self.stage_names = ["stem", *(f"stage{number}" for number in range(1, depth + 1))]
        self.set_output_features_output_indices(out_features=out_features, out_indices=out_indices)

    @property
    def description(self) -> StudentDescription:
        """Raises ValueError where the configuration says nothing of a student."""
        if self.student is None:
            raise ValueError("AdalaConfig: student is missing; python -m adala.export --to hf writes it")
        return StudentDescription(**self.student)


def _one_if_square(sides: Sequence[int]) -> int | list[int]:
    """As other models' configurations have it, by which some heads divide."""
    return sides[0] if sides[0] == sides[1] else list(sides)


def _build(description: StudentDescription) -> LinearizedModel:
    backbone = build_backbone(description.backbone, description.image_size, description.model_args)
    return description.linearize(backbone)


class AdalaPreTrainedModel(PreTrainedModel):
    """A student, as ``student``, under what all models of transformers have."""

    config_class = AdalaConfig
    base_model_prefix = "student"
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True

    def __init__(self, config: AdalaConfig):
        super().__init__(config)
        # transformers builds on the meta device and then fills in weights, and nothing else: tables that are computed
        # (a rotary embedding's) would stay empty, so they are kept beside the buffers that they belong into.
        with torch.device("cpu"):
            self.student = _build(config.description)
        for module in self.student.modules():
            computed = {name: module.get_buffer(name).clone() for name in module._non_persistent_buffers_set}
            object.__setattr__(module, "_computed_buffers", computed)

    def _init_weights(self, module: nn.Module) -> None:
        for name, value in getattr(module, "_computed_buffers", {}).items():
            buffer = module.get_buffer(name)
            if buffer.device.type != "meta":
                buffer.copy_(value)

    def _set_gradient_checkpointing(self, enable: bool = True, **options: Any) -> None:
        # Every block, and in timm's way of it: transformers' options are of its own layers.
        self.student.set_grad_checkpointing(enable)


class AdalaModel(AdalaPreTrainedModel):
    """Features of all tokens."""

    def __init__(self, config: AdalaConfig):
        super().__init__(config)
        self.post_init()

    def forward(self, pixel_values: Tensor, return_dict: bool | None = None, **kwargs: Any) -> Any:
        """Features of images.

        Args:
            pixel_values: Normalised images, (B, 3, height, width).
            return_dict: False for a tuple.
            kwargs: What callers hand to every model; nothing here depends on it.

        Returns:
            ``last_hidden_state`` (B, N, D), after the final norm, and ``pooler_output`` (B, D), the class token, or
            the mean of the patches of a model that has none.
        """
        tokens = self.student(pixel_values)
        patches = tokens[:, self.student.num_prefix_tokens :]
        pooled = tokens[:, 0] if self.student.has_class_token else patches.mean(1)
        if return_dict is False:
            return tokens, pooled
        return BaseModelOutputWithPooling(last_hidden_state=tokens, pooler_output=pooled)


class AdalaBackbone(BackboneMixin, AdalaPreTrainedModel):
    """Feature maps of chosen blocks, as models with an exchangeable backbone take them."""

    has_attentions = False

    def __init__(self, config: AdalaConfig):
        super().__init__(config)
        self.num_features = [config.hidden_size] * len(config.stage_names)
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Feature maps of images.

        Args:
            pixel_values: Normalised images, (B, 3, height, width).
            output_hidden_states: Whether the tokens before and after each block are given, too.
            return_dict: False for a tuple.
            kwargs: What callers hand to every backbone; there are no attention maps, and nothing depends on it.

        Returns:
            ``feature_maps``, one for each of the configuration's ``out_features``: (B, D, h, w), or (B, N, D) where
            ``reshape_hidden_states`` is off; and ``hidden_states``, (B, N, D) each.
        """
        states = self._hidden_states(pixel_values)
        chosen = [state for name, state in zip(self.stage_names, states, strict=True) if name in self.out_features]
        maps = tuple(self._feature_map(state, pixel_values) for state in chosen)
        hidden_states = tuple(states) if output_hidden_states or self.config.output_hidden_states else None
        if return_dict is False:
            return (maps,) if hidden_states is None else (maps, hidden_states)
        return BackboneOutput(feature_maps=maps, hidden_states=hidden_states)

    def _hidden_states(self, images: Tensor) -> list[Tensor]:
        """(B, N, D) before the first block and after each."""
        embedded: list[Tensor] = []
        first = self.student.blocks[0]
        handle = first.register_forward_pre_hook(lambda _, inputs: embedded.append(inputs[0]))
        try:
            after = self.student.forward_intermediates(
                images, return_prefix_tokens=True, output_fmt="NLC", intermediates_only=True
            )
        finally:
            handle.remove()
        return [embedded[0], *(torch.cat([prefix, patches], 1) for patches, prefix in map(_apart, after))]

    def _feature_map(self, tokens: Tensor, images: Tensor) -> Tensor:
        if self.config.apply_layernorm:
            tokens = self.student.norm(tokens)
        if not self.config.reshape_hidden_states:
            return tokens
        patches = tokens[:, self.student.num_prefix_tokens :]
        return patches.transpose(1, 2).unflatten(2, self.student.token_layout(images).grid_size).contiguous()


def _apart(intermediate: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Patches and prefix tokens; timm gives patches alone of a model without prefix tokens."""
    return intermediate if isinstance(intermediate, tuple) else (intermediate, intermediate[:, :0])


AutoConfig.register(MODEL_TYPE, AdalaConfig, exist_ok=True)
AutoModel.register(AdalaConfig, AdalaModel, exist_ok=True)
AutoBackbone.register(AdalaConfig, AdalaBackbone, exist_ok=True)


def write_hugging_face(
    student: nn.Module,
    description: StudentDescription,
    out: Path,
    licence: str = "other",
    title: str | None = None,
    measured: Mapping[str, float] | None = None,
) -> None:
    """Writes a student as a folder that transformers loads.

    ``config.json``, ``model.safetensors``, ``preprocessor_config.json`` (mean, deviation and size of images), a file
    for ``trust_remote_code``, and a model card, README.md.

    Args:
        student: At the description's image size.
        description: Of the student; its task stays behind.
        out: Made, with what lies above it.
        licence: Of the weights, as the hub calls it; ``other`` says nothing, which is all that is known here.
        title: Of the model card; the name of ``out`` by default.
        measured: What is known of its quality, by name.
    """
    out.mkdir(parents=True)
    description = dataclasses.replace(description, task=None)
    tensors = {f"student.{name}": tensor.contiguous() for name, tensor in student.state_dict().items()}
    save_file(tensors, out / WEIGHTS, metadata={"format": "pt"})
    (out / REMOTE_CODE).write_text(REMOTE_SOURCE, encoding="utf-8")
    write_json(out / "preprocessor_config.json", _image_processor(description))
    card = _card(title or out.name, licence, description, measured or {})
    (out / "README.md").write_text(card, encoding="utf-8")
    config = AdalaConfig(student=dataclasses.asdict(description))
    config.architectures = ["AdalaModel"]
    config.auto_map = {auto: f"{Path(REMOTE_CODE).stem}.{name}" for auto, name in AUTO_CLASSES.items()}
    config.save_pretrained(out)
    # safetensors writes files that only their owner may read.
    (out / WEIGHTS).chmod(stat.S_IMODE((out / "config.json").stat().st_mode))


def run_hugging_face(folder: Path) -> Model:
    """What transformers makes of the folder, as a function from images to features."""
    model = AutoModel.from_pretrained(str(folder)).eval()
    return lambda images: model(images).last_hidden_state


def _image_processor(description: StudentDescription) -> dict[str, Any]:
    height, width = description.image_size
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "size": {"height": height, "width": width},
        "resample": 3,  # bicubic
        "rescale_factor": 1 / 255,
        "image_mean": description.mean,
        "image_std": description.std,
    }


def measured_by(folder: Path) -> dict[str, float]:
    """What its stage measured on held-out images, where the folder of a student is a stage's."""
    record = folder / "finished.json"
    return json.loads(record.read_text(encoding="utf-8")).get("metrics", {}) if record.is_file() else {}


def _card(title: str, licence: str, description: StudentDescription, measured: Mapping[str, float]) -> str:
    height, width = description.image_size
    kept = ", ".join(map(str, description.keep)) or "none"
    others = ", ".join(f"{number} ({name})" for number, name in description.block_mechanisms.items()) or "none"
    rows = "".join(f"| {name} | {value:.6g} |\n" for name, value in measured.items())
    numbers = (
        f"\n## Measured on held-out images by the stage that made it\n\n| | |\n| --- | ---: |\n{rows}" if rows else ""
    )
    return f"""---
library_name: transformers
license: {licence}
tags: [adala, linear-attention, image-feature-extraction]
---

# {title}

`{description.backbone}` of timm, its softmax attention replaced by `{description.mechanism}` and adapted with AdaLA
(after ViT-AdaLA, arXiv 2603.16063). Built for {height} x {width} pixels; other sizes that its patches divide work, too.
Blocks that kept softmax: {kept}; with another mechanism: {others}. Its licence is that of the teacher's weights and of
the data that it was adapted on.
{numbers}
## Use

```python
from transformers import AutoBackbone, AutoModel  # pip install 'adala[hf]'

model = AutoModel.from_pretrained("{title}", trust_remote_code=True)
backbone = AutoBackbone.from_pretrained("{title}", trust_remote_code=True, out_indices=[3, 6, 9, 12])
# of a folder on this machine:
# from adala.export.huggingface import AdalaBackbone
# backbone = AdalaBackbone.from_pretrained("{title}", out_indices=[3, 6, 9, 12])
```
"""
