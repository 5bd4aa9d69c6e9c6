"""Names, shapes and types of a model's weights, and tensors that are read on demand."""
