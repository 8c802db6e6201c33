"""PyTorch: any dense transformers causal LM as the target, on the CPU or a CUDA device."""
