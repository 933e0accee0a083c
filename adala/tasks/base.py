"""What a task is: a target and how it is read, views of image and target, a head, a loss, and metrics.

Shapes: B batch, N tokens, D embed dim, H, W height and width of an image in pixels.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from adala.data import Preparation, View
from adala.data.labels import Classes
from adala.data.preparation import TargetReader
from adala.data.tars import Fields
from adala.families import Backbone
from adala.rules import Checked

if TYPE_CHECKING:
    from torchmetrics import Metric

# What a head gives: a tensor, or dicts and lists of tensors, which are all that ZeRO-3's hooks look into.
Prediction = Tensor | dict[str, Any]


@dataclass(frozen=True)
class Task(Checked):
    """What Stage 3 trains for. A subclass is a frozen dataclass, whose fields are its options in a recipe.

    Attributes:
        name: Under which recipes and exported students name it.
        score: Name of the metric by which models are compared.
        score_title: The same for the head of a table's column, with its unit.
        probe: How a backbone without a head of its own is scored: by a linear classifier on pooled features, by one
            for each of several labels, by one on each patch, or not at all.
        fields_of_head: Options that say how a head is built, trained and scored, and nothing of targets: whatever they
            are, features that were stored for these targets stay right.
    """

    name: ClassVar[str]
    score: ClassVar[str]
    score_title: ClassVar[str]
    probe: ClassVar[Literal["linear", "multilabel", "dense"] | None] = None
    fields_of_head: ClassVar[tuple[str, ...]] = ()

    @property
    def target_field(self) -> str | None:
        """Extension of the file that is the target, where an image could be mistaken for it."""
        return None

    @property
    def reader(self) -> TargetReader:
        """:meth:`read_target`, as loaders want it."""
        return TargetReader(self.read_target, self.target_field)

    def read_target(self, fields: Fields, classes: Classes | None, image_size: tuple[int, int]) -> Any:
        """The target of a sample.

        Args:
            fields: Contents of the sample's files by extension.
            classes: Names of the classes beside the shards.
            image_size: Height and width in pixels of its image.

        Raises:
            DecodeError: The sample has none that can be used; it is a bad one.
            ValueError: A target that the task cannot have: the run stops.
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement read_target")

    def is_labelled(self, target: Any) -> bool:
        """Whether a sample's target says anything; a mask all of whose pixels are ignored does not."""
        return True

    def prepare(self, view: View, augmentation: str | None) -> Preparation:
        """From files to the tensors of a batch, all samples' of the same shapes.

        Args:
            view: What the model sees.
            augmentation: By name, of image and target alike; None for what held-out samples are seen as.
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement prepare")

    def prepare_scoring(self, view: View) -> Preparation | None:
        """What a head is finally scored on, where that is not the fixed size that :meth:`prepare` gives: samples may
        then have shapes of their own, and come one by one."""
        return None

    def build_head(self, student: Backbone) -> nn.Module:
        """A fresh head: ``head(features, layout)`` maps features (B, N, D) of tokens laid out so to a prediction.

        Raises:
            ValueError: The options, or a backbone that the head cannot have.
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement build_head")

    def target(self, batch: Mapping[str, Any], device: torch.device) -> Tensor:
        """The batch's target on ``device``.

        Raises:
            ValueError: The batch has none.
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement target")

    def example_target(self, image_size: tuple[int, int]) -> Tensor | None:
        """The target of one image of (H, W), as :meth:`target` gives it for a batch, and as demanding as they come: the
        memory that the loss needs is counted with it. None where that is not known."""
        return None

    def loss(self, prediction: Prediction, target: Tensor, training: bool) -> Tensor:
        """The loss to minimise, a mean over the batch's images, so that it does not depend on micro-batches."""
        raise NotImplementedError(f"{type(self).__name__} does not implement loss")

    def batch_metrics(self, prediction: Prediction, target: Tensor) -> dict[str, Tensor]:
        """Scalars of one training batch, for the log. ``labelled``, the share of the target that is known, is watched:
        an epoch without any stops the run."""
        return {}

    def scores(self, prediction: Prediction, image_size: tuple[int, int]) -> Tensor:
        """A prediction as users read it, for images of (H, W): scores (B, classes, ...), the largest of which decides,
        say."""
        return prediction

    def decision(self, prediction: Prediction, image_size: tuple[int, int]) -> Tensor:
        """A prediction as :meth:`build_metrics` takes it; by default :meth:`scores`."""
        return self.scores(prediction, image_size)

    def predict(
        self, model: Callable[[Tensor], Prediction], images: Tensor, target_size: tuple[int, int], view: View
    ) -> Tensor:
        """Decisions on images that come from :meth:`prepare_scoring`.

        Args:
            model: From images (B, 3, H, W) to a prediction.
            images: (B, 3, H, W), normalised.
            target_size: Height and width of their targets.
            view: What the model has been trained to see.
        """
        return self.decision(model(images), tuple(images.shape[-2:]))

    def build_metrics(self) -> dict[str, "Metric"]:
        """Metrics over a data set: updated with (decision, target), reduced over ranks as they are computed."""
        raise NotImplementedError(f"{type(self).__name__} does not implement build_metrics")
