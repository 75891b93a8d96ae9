"""Real prompts of several kinds, written for this project. `KINDS` maps a kind to its prompts."""

_LIBRARY = (
    "The city council of Westbrook met on Tuesday to discuss the new library. The new library will be built on Main "
    "Street next to the old post office. Council member Jane Porter said the new library will have a reading room for "
    "children and a computer lab for students. The council voted five to two to approve the budget of twelve million "
    "dollars. Construction of the new library will begin in March and is expected to take eighteen months. Residents "
    "who live near Main Street asked about parking during construction, and the council promised a temporary lot."
)
_BEES = (
    "Honey bees find food by scouting. A scout that discovers a rich patch of flowers returns to the hive and performs "
    "a waggle dance. The angle of the waggle dance shows the direction of the flowers relative to the sun, and the "
    "length of the waggle run shows how far away the flowers are. Other bees follow the dancer, then fly to the patch. "
    "When the flowers run out of nectar, the dancers stop, and the colony shifts its foragers to another patch. In "
    "this way the colony as a whole chooses the best flowers, although no single bee compares them."
)
_SHAPES = """def area(shape):
    if shape.kind == "circle":
        return 3.14159 * shape.radius ** 2
    elif shape.kind == "square":
        return shape.side ** 2
    elif shape.kind == "rectangle":
        return shape.width * shape.height
    else:
        raise ValueError("unknown shape")
"""
_ACCOUNT = """class Account:
    def __init__(self, owner, balance=0):
        self.owner = owner
        self.balance = balance

    def deposit(self, amount):
        self.balance += amount
        return self.balance

    def withdraw(self, amount):
        if amount > self.balance:
            raise ValueError("insufficient funds")
        self.balance -= amount
        return self.balance
"""

KINDS = {
    "summarisation": [
        f"Summarize the following article, keeping its wording where you can:\n\n{_LIBRARY}",
        f"Summarize the following text:\n\n{_BEES}",
    ],
    "code editing": [
        f"Rename the parameter `shape` to `figure` in this function and print the whole function:\n\n{_SHAPES}",
        f"Add a docstring to each method of this class and print the whole class:\n\n{_ACCOUNT}",
    ],
    "question": [
        "Explain why the sky is blue, in plain words.",
        "What should I think about before adopting a dog?",
    ],
    "story": [
        "Write a short story about a lighthouse keeper who finds a letter in a bottle.",
        "Describe a morning market in a town by the sea.",
    ],
}
FREE_FORM = ("question", "story")
COPYING = ("summarisation", "code editing")
