"""The embedded models, the embedded data set of opinions, and the demo that uses them."""
