"""Takes the DINOv2 ViT-S/14 out of an ONNX graph: ``python checkpoint.py GRAPH CHECKPOINT REFERENCE``.

CHECKPOINT gets the weights under timm's names, REFERENCE two images and the features that the graph itself gives for
them, with which ``build.py`` checks the conversion. This runs where onnx and onnxruntime are, and needs neither torch
nor adala; ``build.py`` runs where those are.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

DEPTH = 12
# The size of the position embedding, 37 x 37 patches of 14: neither the graph nor timm has to resample it there.
REFERENCE_SIZE = 518
FEATURES = "/backbone/layernorm/Add_1_output_0"

Weights = Mapping[str, np.ndarray]
NodeInputs = Mapping[str, Sequence[str]]


def timm_state(weights: Weights, node_inputs: NodeInputs, depth: int = DEPTH) -> dict[str, np.ndarray]:
    """The graph's backbone under timm's names.

    Biases, norms and scales have kept Hugging Face's names. Matrices and both parts of the position embedding lost
    theirs when constants were folded; they are found as the inputs of the nodes that use them, and matrices lie
    transposed.

    Args:
        weights: Initializers by name.
        node_inputs: Names of a node's inputs, by the node's name.
        depth: Number of blocks.

    Raises:
        ValueError: The graph is another one: a weight or node that is missing is named.
    """
    try:
        state = _embedding_and_norm(weights, node_inputs)
        for block in range(depth):
            state |= {f"blocks.{block}.{name}": value for name, value in _block(weights, node_inputs, block).items()}
    except KeyError as error:
        raise ValueError(f"this is not the expected DINOv2 graph: it has no {error}") from error
    return {name: np.ascontiguousarray(value) for name, value in state.items()}


def _embedding_and_norm(weights: Weights, node_inputs: NodeInputs) -> dict[str, np.ndarray]:
    embeddings = "/backbone/embeddings/"
    positions = [_constant(weights, node_inputs, embeddings + node) for node in ("Concat_6", "Reshape_1")]
    patch = "backbone.embeddings.patch_embeddings.projection."
    return {
        "cls_token": weights["backbone.embeddings.cls_token"],
        "pos_embed": np.concatenate(positions, axis=1),  # that of the class token, then those of the patches
        "patch_embed.proj.weight": weights[patch + "weight"],
        "patch_embed.proj.bias": weights[patch + "bias"],
        "norm.weight": weights["backbone.layernorm.weight"],
        "norm.bias": weights["backbone.layernorm.bias"],
    }


def _block(weights: Weights, node_inputs: NodeInputs, block: int) -> dict[str, np.ndarray]:
    name, node = f"backbone.encoder.layer.{block}.", f"/backbone/encoder/layer.{block}/"

    def matrix(module: str) -> np.ndarray:
        return _constant(weights, node_inputs, f"{node}{module}/MatMul").T

    projections = ("query", "key", "value")
    state = {
        "attn.qkv.weight": np.concatenate([matrix(f"attention/attention/{p}") for p in projections]),
        "attn.qkv.bias": np.concatenate([weights[f"{name}attention.attention.{p}.bias"] for p in projections]),
        "attn.proj.weight": matrix("attention/output/dense"),
        "attn.proj.bias": weights[f"{name}attention.output.dense.bias"],
    }
    for layer in ("fc1", "fc2"):
        state[f"mlp.{layer}.weight"] = matrix(f"mlp/{layer}")
        state[f"mlp.{layer}.bias"] = weights[f"{name}mlp.{layer}.bias"]
    for norm in ("norm1", "norm2"):
        state[f"{norm}.weight"], state[f"{norm}.bias"] = weights[f"{name}{norm}.weight"], weights[f"{name}{norm}.bias"]
    for number in (1, 2):
        state[f"ls{number}.gamma"] = weights[f"{name}layer_scale{number}.lambda1"]
    return state


def _constant(weights: Weights, node_inputs: NodeInputs, node: str) -> np.ndarray:
    """The one weight among the inputs of ``node``."""
    found = [weights[name] for name in node_inputs[node] if name in weights]
    if len(found) != 1:
        raise ValueError(f"this is not the expected DINOv2 graph: {node} has {len(found)} constant inputs, not one")
    return found[0]


def main(graph_path: str, checkpoint: str, reference: str) -> None:
    # Here alone, so that the mapping above can be read and tested without them.
    import onnx
    import onnxruntime
    from safetensors.numpy import save_file

    model = onnx.load(graph_path)
    weights = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    save_file(timm_state(weights, {node.name: node.input for node in model.graph.node}), checkpoint)

    # The graph declares 224 px and the saliency map as its only output, but computes with whatever size comes.
    for axis, dimension in zip(("height", "width"), model.graph.input[0].type.tensor_type.shape.dim[2:], strict=True):
        dimension.dim_param = axis
    model.graph.output.append(onnx.helper.make_empty_tensor_value_info(FEATURES))
    images = np.random.default_rng(0).standard_normal((2, 3, REFERENCE_SIZE, REFERENCE_SIZE), dtype=np.float32)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (features,) = session.run([FEATURES], {model.graph.input[0].name: images})
    save_file({"images": images, "features": features}, reference)
    print(f"checkpoint: {sum(w.size for w in weights.values()) / 1e6:.2f} M values in {Path(graph_path).name}")


if __name__ == "__main__":
    main(*sys.argv[1:])
