"""Self-Play Fine-Tuning (SPIN, arXiv 2401.01335) on Megatron Core."""

__version__ = "0.1.0"
