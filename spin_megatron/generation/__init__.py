"""Engines that answer prompts with theta_t."""
