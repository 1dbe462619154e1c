"""What each task makes of a row as it is published: the exact prompts and candidates."""

REVIEW = "that loves its characters and communicates something rather beautiful about human nature"
STIRRING = (
    "a stirring , funny and finally transporting re-imagining of beauty and the beast and 1930s "
    "horror films"
)
SERFDOM = "How did serfdom develop in and then leave Russia ?"
COOKER = "Couldn't see the point of a rice cooker. Can't see the point of a kitchen without one."
CREAM = "Conceptually cream skimming has two basic dimensions - product and geography"
CREAM_TWO = "roduct and geography are what make cream skimming work."
BABY = (
    "The baby she gave birth to is her husbands and he has even offered to have the courts set her "
    "free if she returns, but "
)
TESLA = (
    "On 7 January 1900, Tesla left Colorado Springs.[citation needed] His lab was torn down in "
    "1904, and its contents were sold two years later to satisfy a debt."
)
SCHOOLS = (
    "Between 2000 and 2009, school enrollment declined by 121,000 students, and the number of "
    "teachers increased by 15,000. The student:teacher ratio was the eighth lowest in the country, "
    "13:1. At $16,000, its per student spending was the nation's highest."
)
SENTIMENT = (" terrible", " bad", " okay", " good", " great")
KINDS_OF_ANSWER = (" Description", " Entity", " Expression", " Human", " Location", " Number")
# task -> prompt, candidates, the right one, what stands for the prompt in calibration
CAUSAL = {
    "opinions": (f"{COOKER} It was", (" terrible", " great"), 1, "It was"),
    "sst2": (f"{REVIEW} It was", (" terrible", " great"), 1, "It was"),
    "sst5": (f"{STIRRING} It was", SENTIMENT, 4, "It was"),
    "trec": (f"Question: {SERFDOM}\nAnswer type:", KINDS_OF_ANSWER, 0, "Answer type:"),
    "snli": (
        "Suppose Two women are embracing while holding to go packages. Can we infer that "
        '"The sisters are hugging goodbye while holding to go packages after just eating lunch."? '
        "Yes, No, or Maybe?\n",
        ("Yes", "Maybe", "No"),
        1,
        "",
    ),
    "mnli": (
        f'Suppose {CREAM}. Can we infer that "P{CREAM_TWO}"? Yes, No, or Maybe?\n',
        ("Yes", "Maybe", "No"),
        1,
        "",
    ),
    "rte": (
        "No Weapons of Mass Destruction Found in Iraq Yet.\nDoes this mean that "
        '"Weapons of Mass Destruction Found in Iraq." is true? Yes or No?\n',
        ("Yes", "No"),
        1,
        "",
    ),
    "cb": (
        "Suppose It was a complex language. Not written down but handed down. One might say it "
        'was peeled down. Can we infer that "the language was peeled down"? Yes, No, or Maybe?\n',
        ("Yes", "No", "Maybe"),
        0,
        "",
    ),
    "boolq": (
        "The Punisher (season 2) -- The season is set for release in 2019. Are they going to make "
        "a punisher season 2?\n",
        ("Yes", "No"),
        0,
        "",
    ),
    "wsc": (
        "Mark told Pete many lies about himself, which Pete included in his book. He should have "
        'been more skeptical.\nIn the previous sentence, does the pronoun "he" refer to Mark? Yes '
        "or No?\n",
        ("No", "Yes"),
        0,
        "",
    ),
    "wic": (
        'Does the word "place" have the same meaning in these two sentences? Yes, No?\nDo you want '
        "to come over to my place later?\nA political system with no place for the less prominent "
        "groups.\n",
        ("No", "Yes"),
        0,
        "",
    ),
    "multirc": (  # the reference keeps the space at the end of the passage
        "Mike and Jeff are close friends. The box looks like it is missing some gumballs. It turns "
        "out some people are eating them when they place their guess. \nQuestion: Roughly how many "
        'gumballs are missing?\nI found this answer "Some". Is that correct? Yes or No?\n',
        ("No", "Yes"),
        1,
        "",
    ),
    "copa": (
        "My body cast a shadow over the grass because",
        (" the sun was rising.", " the grass was cut."),
        0,
        "because",
    ),
    "record": (
        "Mariam has been in Badam Bagh prison.\n- She fled her husband.\n-",
        (f" {BABY}Badam Bagh has refused", f" {BABY}Mariam has refused"),
        1,
        "-",
    ),
}
PAIRS = {  # text with the mask, verbalizers
    "opinions": (f"{COOKER} It was <mask>.", ("terrible", "great")),
    "sst2": (f"{REVIEW} It was <mask>.", ("terrible", "great")),
    "sst5": (f"{STIRRING} It was <mask>.", ("terrible", "bad", "okay", "good", "great")),
    "trec": (
        f"<mask>: {SERFDOM}",
        ("Description", "Entity", "Expression", "Human", "Location", "Number"),
    ),
    "snli": (
        "Two women are embracing while holding to go packages? <mask>, the sisters are hugging "
        "goodbye while holding to go packages after just eating lunch.",
        ("Yes", "Maybe", "No"),
    ),
    "mnli": (f"{CREAM}? <mask>, p{CREAM_TWO}", ("Yes", "Maybe", "No")),
    "rte": (
        "No Weapons of Mass Destruction Found in Iraq Yet? <mask>, weapons of Mass Destruction "
        "Found in Iraq.",
        ("Yes", "No"),
    ),
}
GENERATION = {  # prompt, what is trained behind it, all right answers
    "squad": (
        f"Title: Nikola_Tesla\nContext: {TESLA}\nQuestion: When did Tesla depart from Colorado "
        "Springs?\nAnswer:",
        " 1900\n",
        ("1900", "On 7 January 1900", "7 January 1900"),
    ),
    "drop": (
        f"Passage: {SCHOOLS}\nQuestion: Was enrollment higher in 2000 or 2009?\nAnswer:",
        " 2000\n",
        ("2000",),
    ),
}
CAUSAL["mnli_mm"] = CAUSAL["mnli"]
PAIRS["mnli_mm"] = PAIRS["mnli"]
