"""Models larger than the memory: blocks of weights come and go."""
