"""Weights and side files between MegaVL's flat names and the two Hugging Face formats of DeepSeek-VL."""
