"""The one room that knows Megatron Core."""
