"""Memory and layout planning, without torch."""
