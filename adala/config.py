"""A YAML recipe plus dotted overrides, as frozen dataclasses. Every error names the key.

    recipe = load_recipe("dinov2_large", ["--stage1.lr", "1e-3"])

The string below each field is its documentation and what ``--help`` prints; units stand in it. What its value may be
stands in :mod:`adala.rules`, and is checked as soon as a dataclass is made.
"""

import argparse
import dataclasses
import functools
import os
import re
import typing
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

from adala.rules import CONVERSION_KEYS, Checked, check_block_mechanisms, rule_of, shown, with_text_keys

RECIPE_FOLDER = Path(__file__).parent / "recipes"
DEFAULT_RECIPE = "tiny"
Settings = TypeVar("Settings", bound=Checked)
# Keys that recipes had once, and where what they said stands now.
MOVED = {f"stage3.{key}": f"stage3.task.{key}" for key in ("num_classes", "pooling", "label_smoothing")}

set_parsing_settings(docstring_parse_attribute_docstrings=True)


@dataclasses.dataclass(frozen=True)
class TeacherConfig(Checked):
    """The pretrained softmax ViT that is adapted."""

    name: str = "vit_tiny_patch16_224"
    """timm model name of a ViT (docs/BACKBONES.md), or ``local-dir:FOLDER``, or ``hf-hub:OWNER/NAME``."""
    pretrained: bool = False
    """Whether timm fetches the pretrained weights of that name."""
    checkpoint: str | None = None
    """Local weights (.safetensors or .pth) under timm's keys; ``embedded`` is the teacher in the package, ``random`` a
    network with random weights, for speed tests."""
    model_args: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Further arguments of timm's constructor (embed_dim, depth, patch_size, ...)."""


@dataclasses.dataclass(frozen=True)
class DataConfig(Checked):
    """Shards and preprocessing that the stages share."""

    train: list[str] | str | list[dict[str, Any]] = dataclasses.field(default_factory=lambda: ["embedded:train"])
    """Training shards: folders, globs, brace patterns or URLs beside an index, one or a list (docs/DATA.md);
    ``embedded:train`` is built in. ``[{source: a, weight: 3}, {source: b, weight: 1}]`` is a mixture."""
    val: dict[str, list[str] | str] | list[str] | str = dataclasses.field(default_factory=lambda: ["embedded:val"])
    """Held-out shards, or several sets of them by name, of which the first counts where one number is wanted:
    ``{photos: shards/a, satellites: [shards/b, shards/c]}``, or ``--data.val.photos shards/a``."""
    classes: str | None = None
    """File that lists the names of classes (.json or .txt), for labels that are names; null takes the ``classes.json``
    or ``classes.txt`` beside the shards."""
    image_size: list[int] = dataclasses.field(default_factory=lambda: [28, 28])
    """Height and width in pixels that the model sees; the patch size must divide both."""
    mean: list[float] | None = None
    """Per-channel mean in [0, 1]; null takes the teacher's."""
    std: list[float] | None = None
    """Per-channel standard deviation in [0, 1]; null takes the teacher's."""
    num_workers: int = 0
    """Loader processes per rank."""
    shuffle_buffer: int = 1000
    """Samples in each worker's shuffle buffer."""
    remote_attempts: int = 8
    """Attempts in a row without a new byte before a remote file is given up."""
    stall_timeout_s: float = 60.0
    """Seconds that a server's answer, and then each next byte, may take."""
    total_timeout_s: float = 600.0
    """Seconds that may be spent waiting for one remote file, besides what its size takes at min_mib_per_s."""
    min_mib_per_s: float = 1.0
    """Slowest rate in MiB/s at which a remote file is waited for, on the average."""
    cache_dir: str | None = None
    """Folder on each node's own disk in which its ranks keep the remote shards that they have read; null keeps none."""
    cache_gib: float = 100.0
    """What these shards may take together, in GiB; those not read for longest make room."""
    max_bad_fraction: float = 0.01
    """Part of a data worker's samples that may be bad (docs/DATA.md) before the run stops, in training and evaluation;
    a few may always be, but with 0 none. It may change while a run is under way."""

    def __post_init__(self) -> None:
        if isinstance(self.val, dict):
            sets = {name: [shards] if isinstance(shards, str) else shards for name, shards in self.val.items()}
            object.__setattr__(self, "val", sets)
        super().__post_init__()

    @property
    def val_sets(self) -> dict[str, list[str]]:
        """The held-out shards by the name of their set; of a single one without a name it is empty."""
        return self.val if isinstance(self.val, dict) else {"": self.val}


def val_key(name: str) -> str:
    """The recipe's key of a held-out set."""
    return f"data.val.{name}" if name else "data.val"


@dataclasses.dataclass(frozen=True)
class StageConfig(Checked):
    """What the three stages have in common."""

    steps: int = 100
    """Optimizer steps."""
    global_batch_size: int = 64
    """Samples per optimizer step over all ranks; independent of how many ranks there are."""
    micro_batch_size: int | None = None
    """Samples per rank and forward pass; null is the global batch divided by the ranks. The rest is accumulated."""
    lr: float = 1e-3
    """Peak learning rate of AdamW."""
    min_lr: float = 0.0
    """Learning rate at the last step of the cosine."""
    warmup_steps: int = 10
    """Steps of linear warm-up; where there are fewer steps than that, the rate stays below its peak."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Shape of the rate after warm-up."""
    weight_decay: float = 0.0
    """Decoupled weight decay of matrices; biases, norms and embeddings have none."""
    betas: list[float] = dataclasses.field(default_factory=lambda: [0.9, 0.999])
    """AdamW's decay rates."""
    gradient_clipping: float = 1.0
    """Largest global gradient norm; 0 is no clipping."""
    ema: float = 0.0
    """Decay of an average of the weights over steps (0.999, say), which is what is evaluated and exported; it follows
    faster at the start, by min(ema, (1 + step) / (10 + step)). 0 keeps none."""
    train_data: list[str] | str | list[dict[str, Any]] | None = None
    """Training shards of this stage, or a mixture, as data.train has them; null takes data.train."""
    augmentation: Literal["none", "crop", "shift", "strong", "scale"] = "crop"
    """Training augmentation."""
    image_size: list[int] | None = None
    """Height and width in pixels that this stage trains on and is evaluated on meanwhile; null takes data.image_size,
    which the model is built for. A smaller one is cheaper: position embeddings are resampled as images come."""
    image_sizes: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    """Other image sizes to train on from given steps on, counted from 0: ``[{from_step: 870, image_size: [448, 448],
    micro_batch_size: 4}]`` leaves the last 30 of 900 steps to 448 px. The global batch, the rate and the size of
    evaluations stay; without a micro_batch_size that of the stage does, too."""
    activation_checkpointing: bool = False
    """Drops the activations inside each block and computes them again in the backward pass: much less memory for a
    third more work, the same losses to the bit. Stage 1 holds one block's anyway, but under ZeRO-3."""
    compile: bool = False
    """Trains with the blocks under torch.compile, which the first steps wait for; results change by rounding."""
    start_from: str = "auto"
    """``auto`` (the newest earlier stage's student in this run, else the linearized teacher), ``linearized``, or a
    folder with an exported student."""
    log_every: int = 10
    """Steps between lines of metrics."""
    save_every: int = 0
    """Steps between checkpoints; 0 saves by the clock, and at the end."""
    save_every_minutes: float = 15.0
    """Minutes between checkpoints besides those of save_every; 0 saves by steps alone. Training goes on meanwhile."""
    keep_last: int = 2
    """How many of the newest checkpoints are kept."""
    keep_every: int = 0
    """Checkpoints after a multiple of so many steps are kept for good; 0 keeps the newest alone."""
    evaluate_every: int = 0
    """Steps between evaluations on data.val; 0 evaluates at the start and the end only."""
    max_skipped_steps: int = 5
    """Consecutive steps whose gradient or loss is not finite, and which leave the weights alone, before the run stops;
    each is a row of the split ``skipped`` in metrics.jsonl, with the block that it begins in."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr is {self.min_lr}: it must be a number from 0 to lr, which is {self.lr}")
        last = max((change["from_step"] for change in self.image_sizes), default=0)
        if last >= self.steps:
            raise ValueError(
                f"image_sizes has a size from step {last} on: it must be a step below steps, which is {self.steps}"
            )


@dataclasses.dataclass(frozen=True)
class AttentionAlignmentConfig(StageConfig):
    """Stage 1: each block's attention against its frozen softmax counterpart."""

    loss: Literal["mse", "normalized_mse", "head_output_mse_1000", "attention_map_cross_entropy"] = "normalized_mse"
    """``mse`` after the output projection as in the paper; ``normalized_mse`` is that over the target's variance."""


@dataclasses.dataclass(frozen=True)
class FeatureAlignmentConfig(StageConfig):
    """Stage 2: the whole student's final features against the frozen teacher's."""

    loss: Literal["mse", "normalized_mse", "standardized_mse", "cosine_smooth_l1"] = "normalized_mse"
    """``mse`` as in the paper; ``normalized_mse`` is that over the target's variance, ``standardized_mse`` that over
    each channel's; ``cosine_smooth_l1`` is 0.9 (1 - cosine) of tokens and 0.1 smooth L1 in standard deviations."""
    global_weight: float = 0.0
    """Weight of the same loss of the class token, or of the patches' mean where there is none; 0 leaves it out."""
    intermediate_weight: float = 0.0
    """Weight of the normalised MSE of what comes out of intermediate_blocks, the mean over them; 0 leaves it out."""
    intermediate_blocks: list[int] | int = 4
    """Which blocks, counted from 0; or a number k for every k-th: 4 is ``[3, 7, 11]`` of twelve."""
    trainable: Literal["all", "qkv"] = "all"
    """``qkv`` tunes the attention's Q, K, V only (the paper's ablation)."""
    freeze: list[str] | str = dataclasses.field(default_factory=list)
    """Student parameters that stay as they are, as patterns: ``["patch_embed.*"]``, say."""


@dataclasses.dataclass(frozen=True)
class FinetuningConfig(StageConfig):
    """Stage 3: a task's head on the student, supervised."""

    task: dict[str, Any] = dataclasses.field(default_factory=lambda: {"name": "classification", "num_classes": 10})
    """What is trained for: its ``name`` (classification, multilabel, segmentation, or an installed package's) and its
    options, as docs/TASKS.md lists them."""
    freeze_backbone: bool = False
    """Train the head alone, on frozen features."""
    head_init: Literal["random", "probe"] = "random"
    """``probe`` starts a classification head as a linear probe on frozen features (LP-FT)."""
    head_init_samples: int = 16000
    """Training samples that the probe of head_init is fitted on (the first ones, in shard order)."""
    head_lr: float | None = None
    """Peak rate of the head; null takes lr."""

    def __post_init__(self) -> None:
        if isinstance(self.task, dict):
            # A label map has numbers to the left, and JSON knows texts alone there.
            object.__setattr__(self, "task", {key: with_text_keys(value) for key, value in self.task.items()})
        super().__post_init__()


@dataclasses.dataclass(frozen=True)
class EvaluationConfig(Checked):
    """How models are scored; the same for teacher and students."""

    batch_size: int = 250
    """Samples per rank and forward pass."""
    monitor_samples: int = 1000
    """Held-out samples that a stage is evaluated on while it trains (the first ones, in shard order)."""
    probe_train: list[str] | str | None = None
    """Shards with targets that probes and frozen heads are fitted on; null takes data.train."""
    probe_samples: int = 4000
    """How many of them for the table at the end of a run (the first ones, in shard order)."""
    probe_l2: float = 1e-3
    """L2 penalty of that table's linear probe on standardised features, per sample."""


@dataclasses.dataclass(frozen=True)
class SearchConfig(Checked):
    """How ``keep: auto`` chooses blocks; without it, nothing here has a meaning."""

    images: int = 256
    """Unlabelled images that hybrids are measured on: the first of Stage 1's training data, in shard order."""
    image_size: list[int] | None = None
    """Their height and width in pixels; null takes Stage 1's."""


@dataclasses.dataclass(frozen=True)
class Recipe(Checked):
    """One adaptation of one teacher by one mechanism."""

    run_name: str = "tiny"
    """The run's folder under runs_dir."""
    runs_dir: str = "runs"
    """Where runs lie."""
    seed: int = 0
    """Seed of initialisation, sample order and augmentation."""
    mechanism: str = "linear"
    """Attention mechanism of the student."""
    mechanism_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Options of the mechanism by field name."""
    keep: list[int] | str = dataclasses.field(default_factory=list)
    """Blocks that keep their softmax attention (a hybrid), counted from 0; ``auto:2`` has a search after Stage 1 choose
    two, ``auto:75%@448`` as many as leave the hybrid at most 75 % of the teacher's multiply-accumulates at 448 px."""
    block_mechanisms: dict[int, str] = dataclasses.field(default_factory=dict)
    """Blocks that have another mechanism than the student's, by number: ``{4: window, 7: window}``."""
    block_mechanism_options: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    """Options of these other mechanisms by name: ``{window: {window: 4}}``."""
    conversion: Literal["adala", "native"] = "adala"
    """ViT-AdaLA's stages, or the conversion that the mechanism's own authors use."""
    over_conversion: list[str] | str = dataclasses.field(default_factory=list)
    """Keys (``stage1.lr``, say) whose value here goes before what a native conversion states; those given on the
    command line are added by themselves."""
    kernel: Literal["auto", "fused", "reference"] = "auto"
    """What computes linear attention: a fused kernel wherever there is one, or plain operations (``reference``)."""
    ds_config: str = "zero1"
    """DeepSpeed configuration (ZeRO and precision only): a name in ds_configs/ or a path."""
    hang_minutes: float = 20.0
    """Minutes without a step, or a batch of an evaluation, after which training counts as hung: each rank writes its
    stacks beside the run, and ends; 0 is never."""
    tensorboard: bool = True
    """Write TensorBoard event files beside the JSONL metrics."""
    teacher: TeacherConfig = dataclasses.field(default_factory=TeacherConfig)
    """The pretrained model."""
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    """Shards and preprocessing."""
    stage1: AttentionAlignmentConfig = dataclasses.field(default_factory=AttentionAlignmentConfig)
    """Attention alignment."""
    stage2: FeatureAlignmentConfig = dataclasses.field(default_factory=FeatureAlignmentConfig)
    """Feature alignment."""
    stage3: FinetuningConfig = dataclasses.field(default_factory=FinetuningConfig)
    """Supervised fine-tuning."""
    search: SearchConfig = dataclasses.field(default_factory=SearchConfig)
    """The search for blocks that keep softmax attention."""
    evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)
    """Scoring."""

    def __post_init__(self) -> None:
        super().__post_init__()
        kept = () if isinstance(self.keep, str) else self.keep  # a text has blocks chosen later, whatever they have
        check_block_mechanisms(self.mechanism, kept, self.block_mechanisms, self.block_mechanism_options)

    def stage(self, number: int) -> StageConfig:
        """The configuration of stage 1, 2 or 3."""
        return (self.stage1, self.stage2, self.stage3)[number - 1]

    def with_stage(self, number: int, **changes: Any) -> "Recipe":
        """This recipe with other values in stage 1, 2 or 3.

        Raises:
            ValueError: A value that its key cannot have.
        """
        name = f"stage{number}"
        with _below(name):
            section = dataclasses.replace(self.stage(number), **changes)
        return dataclasses.replace(self, **{name: section})


@contextmanager
def _below(section: str) -> Iterator[None]:
    """Puts a section's name before the key that is refused in it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{section}.{error}") from error


def recipe_path(name: str) -> Path:
    """The file of a recipe: a name in ``adala/recipes``, or a path to a YAML file.

    Raises:
        ValueError: There is no such recipe; the message lists those there are.
    """
    return settings_path(name, RECIPE_FOLDER, "recipe")


def settings_path(name: str, folder: Path, kind: str) -> Path:
    """The YAML file that ``--KIND NAME`` means: a name in ``folder``, or a path.

    Raises:
        ValueError: There is no such file; the message lists the names there are.
    """
    named, path = folder / f"{name}.yaml", Path(os.path.expanduser(name))
    if "/" not in name and named.is_file():
        return named
    if path.is_file():
        return path
    if path.is_dir():
        raise ValueError(f"--{kind} {name}: it is a folder; give the .yaml file in it")
    known = ", ".join(sorted(p.stem for p in folder.glob("*.yaml")))
    raise ValueError(f"--{kind} {name}: there is no such {kind}; known are {known}, or give the path of a .yaml file")


@dataclasses.dataclass(frozen=True)
class Command:
    """What one command line asks for.

    Attributes:
        recipe: The recipe with its overrides applied.
        stages: Numbers of the stages to run, in order.
        overwrite: Whether a finished stage may be run again.
    """

    recipe: Recipe
    stages: tuple[int, ...]
    overwrite: bool


@functools.cache
def build_parser() -> ArgumentParser:
    """The training command's parser: a recipe's fields as dotted options (``--stage1.lr``), and what goes beside."""
    parser = ArgumentParser(
        exit_on_error=False,
        allow_abbrev=False,
        description="Adapts a pretrained softmax ViT to linear attention in three stages (ViT-AdaLA).",
    )
    parser.add_argument("--stage", choices=["1", "2", "3", "all"], default="all", help="which stage to run")
    parser.add_argument("--recipe", type=str, default=DEFAULT_RECIPE, help="name in adala/recipes, or a .yaml path")
    parser.add_argument("--overwrite", action="store_true", help="run a finished stage again, replacing it")
    parser.add_argument(
        "--local_rank", type=int, default=0, help="set by the DeepSpeed launcher; read from RANK anyway"
    )
    parser.add_class_arguments(Recipe, nested_key=None)
    return parser


def parse_command(arguments: Sequence[str]) -> Command:
    """Reads a command line: the recipe it names, then its dotted overrides.

    Raises:
        ValueError: Unknown recipe, unknown key, or a value of the wrong type or out of range; the message names the
            key.
    """
    recipe, parsed = parse_recipe_command(build_parser(), arguments)
    asked = [key for key in _keys_given(arguments) if key in CONVERSION_KEYS and key not in recipe.over_conversion]
    recipe = dataclasses.replace(recipe, over_conversion=[*recipe.over_conversion, *asked])
    stages = (1, 2, 3) if parsed.stage == "all" else (int(parsed.stage),)
    return Command(recipe, stages, parsed.overwrite)


def parse_recipe_command(parser: ArgumentParser, arguments: Sequence[str]) -> tuple[Recipe, Any]:
    """The recipe that a command line names, with its overrides, and everything that was parsed.

    Args:
        parser: Knows ``--recipe``, a recipe's fields, and what else the command has.
        arguments: The command line.

    Raises:
        ValueError: See :func:`parse_command`.
    """
    flat, nested = _split_nested(arguments)
    try:
        path = recipe_path(_recipe_argument(arguments))
        defaults = read_settings(parser, path, Recipe, "recipe")
        _refuse_moved(_keys_given(arguments))
        parsed = parser.parse_args(flat, namespace=defaults)
    except (ArgumentError, OverflowError) as error:
        raise ValueError(f"command line: {explained(error, Recipe)}") from error
    return build_settings(Recipe, _set_nested(parsed.as_dict(), nested, _keys_given(flat))), parsed


def _split_nested(arguments: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """The arguments that the parser reads, and what is asked for two levels below a mapping, or deeper, by dotted key.

    Of these (``--stage3.task.head_options.num_queries 8``) the parser would keep the last one only, as text.
    """
    ours, nested, rest = [], {}, list(arguments)
    while rest:
        argument = rest.pop(0)
        key, is_joined, value = argument.partition("=")
        if not argument.startswith("--") or not _is_nested(key[2:]):
            ours.append(argument)
            continue
        if key[2:] in nested:
            raise ValueError(f"command line: {key} stands there twice")
        if not is_joined:
            if not rest or rest[0].startswith("--"):
                raise ValueError(f"command line: {key} needs a value")
            value = rest.pop(0)
        try:
            nested[key[2:]] = yaml.load(value, _SettingsLoader)
        except yaml.YAMLError as error:
            raise ValueError(
                f"command line: {key} is {value!r}: it must be YAML ({explained(error, Recipe)})"
            ) from error
    return ours, nested


def _is_nested(key: str) -> bool:
    """Whether a key lies two levels or more below a mapping of a recipe, or one below what may be a mapping."""
    parts, built = key.split("."), Recipe
    for depth, part in enumerate(parts):
        fields = {field.name: field.type for field in dataclasses.fields(built)}
        if part not in fields:
            return False
        if typing.get_origin(fields[part]) is dict:
            return len(parts) - depth > 2
        if _may_be_mapping(fields[part]):
            return len(parts) - depth > 1
        if not dataclasses.is_dataclass(fields[part]):
            return False
        built = fields[part]
    return False


def _may_be_mapping(kind: Any) -> bool:
    return any(typing.get_origin(one) is dict for one in typing.get_args(kind))


def _set_nested(values: dict[str, Any], nested: Mapping[str, Any], given: Sequence[str]) -> dict[str, Any]:
    """``values`` with others at some dotted keys.

    Args:
        values: Of a recipe's fields.
        nested: By dotted key. The first of them that lies below a list (a plain ``data.val``) takes its place.
        given: Keys that the command line has beside these.

    Raises:
        ValueError: A key leads through something that is no mapping.
    """
    for key, value in nested.items():
        *path, last = key.split(".")
        below = values
        for part in path:
            if isinstance(below.get(part), list) and ".".join(path) not in given:
                below[part] = {}
            below = below.setdefault(part, {})
            if not isinstance(below, dict):
                raise ValueError(f"command line: {key} lies below {part}, which is {shown(below)} and no mapping")
        below[last] = value
    return values


def build_settings(built: type[Settings], values: dict[str, Any]) -> Settings:
    """The dataclass ``built`` of nested ``values``, as the parser leaves them.

    Raises:
        ValueError: A value that its key cannot have; the message begins with the dotted key.
    """
    given = {}
    for field in dataclasses.fields(built):
        given[field.name] = values[field.name]
        if dataclasses.is_dataclass(field.type):
            with _below(field.name):
                given[field.name] = field.type(**values[field.name])
    return built(**given)


def load_recipe(name: str = DEFAULT_RECIPE, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe by name or path with dotted overrides such as ``["--stage1.lr", "1e-3"]``.

    Raises:
        ValueError: As :func:`parse_command`.
    """
    return parse_command(["--recipe", name, *overrides]).recipe


def _refuse_moved(keys: Iterable[str]) -> None:
    for key in keys:
        if key in MOVED:
            raise ValueError(f"{key} is {MOVED[key]} now: a task's options stand together, beside its name")


def _keys_given(arguments: Sequence[str]) -> list[str]:
    """The dotted keys on a command line, each once."""
    options = [argument[2:].partition("=")[0] for argument in arguments if argument.startswith("--")]
    return list(dict.fromkeys(options))


def _recipe_argument(arguments: Sequence[str]) -> str:
    """The value of ``--recipe``, needed before the rest can be parsed: it supplies their defaults."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    early.add_argument("--recipe", default=DEFAULT_RECIPE)
    return early.parse_known_args(list(arguments))[0].recipe


class _SettingsLoader(yaml.SafeLoader):
    """YAML in which a key stands once, ``1e-3`` is a number, a date is text, and text names files as UTF-8."""

    def construct_name(self, node: yaml.ScalarNode) -> str:
        # As the command line's arguments come: under a locale that cannot write it, the file is found nevertheless.
        return os.fsdecode(self.construct_scalar(node).encode(errors="surrogateescape"))

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen: set[Hashable] = set()
        for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key} stands here twice", key_node.start_mark)
            seen.update([key] if isinstance(key, Hashable) else [])
        return super().construct_mapping(node, deep)


_SettingsLoader.add_constructor("tag:yaml.org,2002:str", _SettingsLoader.construct_name)
_SettingsLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_SettingsLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+"), list("-+.0123456789")
)


def read_settings(parser: ArgumentParser, path: Path, built: type[Checked], kind: str) -> Any:
    """A YAML file's values over the defaults, as the parser's namespace.

    Args:
        parser: Of the fields of ``built``.
        path: The file.
        built: The dataclass whose fields, and sections of fields, are the file's keys.
        kind: What the file is ("recipe"), for messages.

    Raises:
        ValueError: The file cannot be read, is no mapping, or has a key or a value that it cannot have.
    """
    sections = [field.name for field in dataclasses.fields(built) if dataclasses.is_dataclass(field.type)]
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _SettingsLoader)
        if not isinstance(values, dict):
            what = "it is empty" if values is None else f"it holds {shown(values)}"
            first = dataclasses.fields(built)[0].name
            raise ValueError(f"{what}: it must be a mapping of keys such as {first} and {sections[0]}")
        for name in sections:
            if name in values:
                _check_section(name, values)
        _refuse_moved(_dotted_keys(values))
        return parser.parse_object(values)
    except UnicodeDecodeError as error:
        raise ValueError(f"{kind} {path}: it is not UTF-8 text ({error.reason} at byte {error.start})") from error
    except OSError as error:
        raise ValueError(f"{kind} {path}: it cannot be read ({error.strerror})") from error
    except (ArgumentError, yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"{kind} {path}: {explained(error, built)}") from error


def _dotted_keys(values: dict) -> Iterator[str]:
    for key, value in values.items():
        yield str(key)
        yield from (f"{key}.{below}" for below in value) if isinstance(value, dict) else ()


def _check_section(name: str, values: dict) -> None:
    section = values[name]
    if not isinstance(section, dict):
        raise ValueError(f"{name} is {shown(section)}: it must have keys of its own; leave it out for its defaults")
    for key in section:
        if f"{name}.{key}" in values:
            raise ValueError(f"{name}.{key} stands here twice, below {name} and by itself")


def explained(error: Exception, built: type[Checked]) -> str:
    """A parser's error about a key of ``built`` in one sentence, which says what the key's value must be."""
    text = " ".join(str(error).split())
    refused = re.fullmatch(r'Parser key "([\w.]+)": .*(?:Got value|Given value|int\(\) with base 10): ?(.*)', text)
    field = _field_of(refused[1], built) if refused else None
    if field is not None:
        return f"{refused[1]} is {refused[2] or 'empty'}: it must be {rule_of(field).words}"
    if re.match(r"unrecognized arguments: (?!-)", text):
        return f"{text}; several values are one list ('[a, b]'), and a pattern like 'train-*.tar' needs quotes"
    return text


def _field_of(key: str, built: type[Checked]) -> dataclasses.Field | None:
    """The field of ``built`` that a dotted key names."""
    section, fields = built, {}
    for part in key.split("."):
        fields = {field.name: field for field in dataclasses.fields(section)} if section else {}
        section = fields[part].type if part in fields and dataclasses.is_dataclass(fields[part].type) else None
    return fields.get(key.split(".")[-1])


def recipe_to_yaml(recipe: Recipe) -> str:
    """The recipe with every field written out, as YAML that ``--recipe`` reads."""
    return yaml.safe_dump(dataclasses.asdict(recipe), sort_keys=False)
