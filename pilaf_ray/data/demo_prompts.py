"""The demo's own prompts: everyday writing requests over concrete topics.

Written for this project; free to use under its licence. The splits share no topic,
so held-out prompts are new in substance and not only in wording.
"""

from pilaf_ray.errors import PromptError

_TOPICS = {
    "the film": (
        "about a lighthouse keeper|about two rival bakers|about a lost dog|about a night train|about a chess club|"
        "about a flooded village|about a retired spy|about a school play|about a mountain rescue|about a jazz band|"
        "about a desert crossing|about a family farm|about a stolen painting|about a deep-sea dive|"
        "about a small newspaper|about a wedding in the rain|about a robot gardener|about a long strike|"
        "about a young boxer|about a winter on an island|about a travelling circus|about a city bus driver"
    ),
    "the meal": (
        "at a harbour restaurant|at a noodle bar|at a roadside diner|at a vegetarian canteen|at a pizza place|"
        "at a hotel breakfast|on a long flight|at a street market|at a steak house|at a tea room|at a tapas bar|"
        "at a school canteen|at a curry house|at a bakery cafe|at a fish stall|at a mountain hut|"
        "at a wedding party|at a food truck|at a sushi counter|at a train buffet|at a country pub|at a salad bar"
    ),
    "the book": (
        "about the history of salt|about training pigeons|about a sea voyage|about growing tomatoes|"
        "about ancient bridges|about a haunted hotel|about learning Greek|about the deep ocean|about card tricks|"
        "about a mining town|about bird songs|about beekeeping|about a famous trial|about old maps|about sleep|"
        "about a polar winter|about making violins|about city planning|about wild mushrooms|about chess endings|"
        "about a lost letter|about river fishing"
    ),
    "the trip": (
        "to a coastal town|to a salt desert|to a mountain lake|to an old castle|to a rain forest|to a ski village|"
        "to a busy capital|to a vineyard|to a volcanic island|to a national park|to a river delta|to a theme park|"
        "to a quiet monastery|to a fishing port|to a glass factory|to a summer festival|to a cave|to a zoo|"
        "to a market town|to a northern fjord|to a spa hotel|to a car museum"
    ),
    "the product": (
        "a folding bicycle|a coffee grinder|a desk lamp|a pair of hiking boots|a garden hose|an electric kettle|"
        "a travel pillow|a set of kitchen knives|a robot vacuum|a rain jacket|a phone stand|a camping stove|"
        "a wall clock|a cordless drill|a water bottle|an office chair|a bread machine|a bedside radio|"
        "a sleeping bag|a pocket notebook|a bathroom scale|a toy train"
    ),
    "the event": (
        "a village concert|a science fair|a book signing|a charity run|a museum opening|a cooking class|"
        "a street parade|a football match|a poetry night|a farm open day|a chess tournament|a film festival|"
        "a dance show|a car boot sale|a school reunion|a harvest fair|a comedy night|a public lecture|"
        "a sailing race|a flower show|a job fair|a choir rehearsal"
    ),
}

_TEMPLATES = (
    "Write a short review of {topic}.",
    "Describe your impression of {topic} in two sentences.",
    "Tell a friend what you think of {topic}.",
    "Write a brief comment on {topic} for a website.",
    "Summarise how {topic} was.",
    "Give your opinion of {topic}.",
    "Write a diary entry about {topic}.",
    "What was {topic} like?",
    "Write a few lines about {topic} for a newsletter.",
    "Explain whether you would recommend {topic}.",
    "Write a postcard that mentions {topic}.",
    "Report briefly on {topic}.",
    "Start a letter by describing {topic}.",
    "Say in a few words how you remember {topic}.",
    "Write a caption for a photo of {topic}.",
    "Write feedback on {topic} for the people behind it.",
    "Describe {topic} to someone who was not there.",
    "Write an honest note about {topic}.",
    "Compare {topic} with what you expected.",
    "Write one paragraph on {topic}.",
    "Answer a reader who asks about {topic}.",
)

_HELD_OUT = {"evaluation": range(0, 2), "final": range(2, 4), "train": range(4, 22)}


def demo_prompts(split: str) -> list[str]:
    """The prompts of ``train`` (over 2,000), ``evaluation`` or ``final`` (over 200 each)."""
    if split not in _HELD_OUT:
        raise PromptError(f"builtin:reviews/{split}: the splits are train, evaluation and final")
    prompts = []
    for number in _HELD_OUT[split]:
        for template in _TEMPLATES:
            for kind, names in _TOPICS.items():
                prompts.append(template.format(topic=_topic(kind, names.split("|")[number])))
    return prompts


def _topic(kind: str, name: str) -> str:
    return f"{kind} {name}" if name.startswith(("about", "at ", "to ", "on ")) else name
