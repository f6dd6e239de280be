"""Chain-of-Prompts on typed and untyped images, against simpler rules."""
