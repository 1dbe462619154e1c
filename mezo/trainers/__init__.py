"""transformers' Trainer, and TRL's, with MeZO as the optimizer."""
