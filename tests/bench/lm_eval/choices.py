"""What aqua.yaml asks of a row."""


def texts(doc):
    """The options without their letters, "A)21" being the first of them."""
    return [" " + option[2:] for option in doc["options"]]


def right(doc):
    """Which option is the answer."""
    return "ABCDE".index(doc["correct"])
