"""MegaVL: 3D-parallel training of the DeepSeek-VL vision-language models on megatron-core."""
