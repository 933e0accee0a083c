"""What a recipe's stages need of a GPU's memory, from tensors on the meta device alone.

    python -m adala.memory --recipe dinov2_large --gpus 8 --gpu_gib 80

``tracing`` counts what a forward and backward pass keeps alive, ``states`` what DeepSpeed holds, ``planner`` chooses,
``text`` tells.
"""
