"""The LoRA adapter: from a plan to PEFT's config, its live masked form, and its verification."""
