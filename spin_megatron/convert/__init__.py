"""Hugging Face checkpoints to Megatron Core's and back."""
