"""Single-sentence classification."""

from .task import Hub, Task

# SST-2 (Stanford Sentiment Treebank, phrases of film reviews; GLUE)
#   sentence: "that loves its characters and communicates something rather beautiful about human
#   nature "    label: 1
# -> "that loves ... human nature It was" + " great"
SST2 = Task(
    name="sst2",
    version=1,
    source="arXiv:2305.17333, Tables 13 and 14",
    columns=("sentence",),
    labels=("0", "1"),
    prompt="{sentence} It was",
    candidates=(" terrible", " great"),  # the leading space is part of the token
    mask_prompt="{sentence} It was {mask}.",
    verbalizers=("terrible", "great"),
    text="{sentence}",
    descriptions=("a terrible, awful, boring movie", "a great, wonderful, enjoyable movie"),
    hub=Hub("nyu-mll/glue", "sst2"),
)

# Opinions (comes with the package, written for it: reviews of anything)
#   label: positive    text: "Couldn't see the point of a rice cooker. Can't see the point of a
#   kitchen without one."
# -> "Couldn't see ... without one. It was" + " great"
OPINIONS = Task(
    name="opinions",
    version=1,
    source="this package",
    columns=("text",),
    labels=("negative", "positive"),
    prompt="{text} It was",
    candidates=(" terrible", " great"),  # the leading space is part of the token
    mask_prompt="{text} It was {mask}.",
    verbalizers=("terrible", "great"),
    text="{text}",
    descriptions=("negative", "positive"),
    folder="demo/opinions",
)
