"""What timm's softmax attention is computed with, and other mechanisms have no use for."""

from typing import Any, NoReturn

# Whatever computes timm's attention outside of it, from its parts, reads one of these.
OF_SOFTMAX = ("fused_attn", "scale", "attn_drop")


class OfSoftmax:
    """Stands in an attention for a thing that only softmax has, and refuses every use of it with a ValueError.

    Much code around timm does not call a block's attention, but takes ``qkv`` and ``proj`` out of it and computes
    softmax in between (mask heads, maps of attention). With these parts of a linearized attention that would run, and
    be wrong.

    Not a missing attribute: code that looks through a model for ``fused_attn``, to set it, does no harm.
    """

    def __init__(self, name: str):
        self._name = name

    def _refuse(self, *arguments: Any, **options: Any) -> NoReturn:
        raise ValueError(
            f"attn.{self._name} belongs to softmax, and this attention was linearized: code that reads it computes "
            "softmax from the attention's parts, which would be wrong; have it call the whole attention, block.attn(x)"
        )

    __bool__ = __float__ = __call__ = _refuse
    __mul__ = __rmul__ = __truediv__ = __rtruediv__ = __pow__ = __rpow__ = _refuse

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # which copying and pickling look for
            raise AttributeError(name)
        return self._refuse()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._name!r})"
