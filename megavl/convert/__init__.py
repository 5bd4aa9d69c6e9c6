"""Converts weights and configuration files between MegaVL and the two Hugging Face formats of DeepSeek-VL."""
