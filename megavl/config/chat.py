"""Fixed texts of the released chats, which data, conversion and generation share.

Source: deepseek-ai/DeepSeek-VL at 681bffb, `deepseek_vl/models/processing_vlm.py`.
"""

IMAGE_TOKEN = "<image_placeholder>"
"""Text of the image token: one position of an image in a sequence, and a whole image in a prompt."""

SYSTEM_PROMPT = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)

USUAL_NAMES = {
    "bos_token": ("<｜begin▁of▁sentence｜>", "<s>", "<bos>", "<|begin_of_text|>"),
    "eos_token": ("<｜end▁of▁sentence｜>", "</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>"),
    "pad_token": ("<pad>",),
}
"""Usual names of special tokens, tried in this order if no file next to tokenizer.json names the token."""
