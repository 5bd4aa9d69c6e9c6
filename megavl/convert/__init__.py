"""Two-way weight tables and side files of both Hugging Face formats."""
