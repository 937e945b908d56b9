"""Quantized models on disk: `config.json` with our quantization method, and safetensors with packed codes."""
