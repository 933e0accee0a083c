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
    """The graph's backbone under timm's names: initializers by name, and the names of a node's inputs by the node's.

    Biases, norms and scales have kept Hugging Face's names. Matrices and both parts of the position embedding lost
    theirs when constants were folded; they are found as the inputs of the nodes that use them, and matrices lie
    transposed.

    Raises:
        ValueError: The graph is another one: a weight or node that is missing is named.
    """

    def constant(node: str) -> np.ndarray:
        found = [weights[name] for name in node_inputs[node] if name in weights]
        if len(found) != 1:
            raise ValueError(f"this is not the expected DINOv2 graph: {node} has {len(found)} constant inputs, not one")
        return found[0]

    def linear(ours: str, block: str, *theirs: str) -> dict[str, np.ndarray]:
        """A layer of a block, of one or several of theirs."""
        nodes = [f"/backbone/encoder/{block}/{name}/MatMul" for name in theirs]
        biases = [weights[f"backbone.encoder.{block}.{name.replace('/', '.')}.bias"] for name in theirs]
        matrices = [constant(node).T for node in nodes]
        return {f"{ours}.weight": np.concatenate(matrices), f"{ours}.bias": np.concatenate(biases)}

    def norm(ours: str, theirs: str) -> dict[str, np.ndarray]:
        return {f"{ours}.{part}": weights[f"backbone.{theirs}.{part}"] for part in ("weight", "bias")}

    try:
        state = {"cls_token": weights["backbone.embeddings.cls_token"]}
        # That of the class token, then those of the patches.
        positions = [constant(f"/backbone/embeddings/{node}") for node in ("Concat_6", "Reshape_1")]
        state["pos_embed"] = np.concatenate(positions, axis=1)
        state |= norm("patch_embed.proj", "embeddings.patch_embeddings.projection") | norm("norm", "layernorm")
        for number in range(depth):
            ours, block = f"blocks.{number}.", f"layer.{number}"
            attention = [f"attention/attention/{name}" for name in ("query", "key", "value")]
            state |= linear(f"{ours}attn.qkv", block, *attention)
            state |= linear(f"{ours}attn.proj", block, "attention/output/dense")
            for layer in ("fc1", "fc2"):
                state |= linear(f"{ours}mlp.{layer}", block, f"mlp/{layer}")
            for n in (1, 2):
                state |= norm(f"{ours}norm{n}", f"encoder.{block}.norm{n}")
                state[f"{ours}ls{n}.gamma"] = weights[f"backbone.encoder.{block}.layer_scale{n}.lambda1"]
    except KeyError as error:
        raise ValueError(f"this is not the expected DINOv2 graph: it has no {error}") from error
    return {name: np.ascontiguousarray(value) for name, value in state.items()}


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
