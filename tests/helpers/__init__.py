"""What tests share: tiny models, saved adapters, processes, references to compare with."""
