"""What MeZO and its Trainer can be told: one table of options, which everything else reads."""
