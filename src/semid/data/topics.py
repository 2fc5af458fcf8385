"""The words of the synthetic catalogue: departments, aisles, niches, and how things look."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["DEPARTMENTS", "VARIANTS", "Department", "plural"]


@dataclass(frozen=True)
class Department:
    """A part of the shop with its own vocabulary.

    Attributes:
        name: what it is called.
        aisles: the subtopics, each with the things sold there (the niches), in the singular.
        styles: what stands before a thing in a title.
        finishes: what stands after it.
        brands: the makers, invented.
    """

    name: str
    aisles: dict[str, tuple[str, ...]]
    styles: tuple[str, ...]
    finishes: tuple[str, ...]
    brands: tuple[str, ...]


VARIANTS = ("", "gift edition", "limited edition", "new edition", "classic edition")
"""What may close a title; most have nothing."""


def plural(noun: str) -> str:
    """Return the plural of a noun of these lists."""
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + ("es" if noun.endswith(("s", "x", "ch", "sh")) else "s")


DEPARTMENTS = (
    Department(
        "Home",
        {
            "Lighting": ("desk lamp", "floor lamp", "pendant light", "wall sconce"),
            "Furniture": ("side table", "bookcase", "armchair", "bed frame"),
            "Textiles": ("throw blanket", "cushion cover", "area rug", "linen curtain"),
            "Storage": ("storage basket", "coat rack", "drawer organizer", "glass jar"),
        },
        ("Walnut", "Oak", "Rattan", "Marble", "Nordic", "Mid-century", "Handmade", "Bauhaus"),
        ("brushed brass", "matte black", "smoked glass", "natural", "sage green", "ivory"),
        ("Alderholm", "Brightwick", "Casa Tiva", "Fernlund", "Mossgate", "Quarrelle"),
    ),
    Department(
        "Kitchen",
        {
            "Cookware": ("skillet", "stock pot", "wok", "roasting pan"),
            "Coffee and tea": ("pour-over dripper", "teapot", "hand grinder", "milk jug"),
            "Knives": ("paring knife set", "bread slicer", "sharpening stone", "cutting board"),
            "Baking": ("loaf tin", "mixing bowl", "rolling pin", "cooling rack"),
        },
        ("Cast-iron", "Copper", "Stainless", "Enamel", "Bamboo", "Stoneware", "Pro", "Heritage"),
        ("hammered", "polished", "non-stick", "cobalt blue", "speckled", "with lid"),
        ("Brasero", "Copperhall", "Dunmere", "Larkpan", "Ostrava Steel", "Tessel"),
    ),
    Department(
        "Beauty",
        {
            "Skin care": ("face serum", "night cream", "clay mask", "cleansing oil"),
            "Hair care": ("shampoo bar", "hair mask", "scalp tonic", "boar brush"),
            "Make-up": ("lip tint", "eyeshadow palette", "brow pencil", "mineral powder"),
            "Fragrance": ("cologne", "body mist", "solid perfume", "scented candle"),
        },
        ("Rose", "Green tea", "Vitamin C", "Charcoal", "Aloe", "Shea", "Sea salt", "Bergamot"),
        ("fragrance-free", "for dry skin", "for oily skin", "vegan", "30 ml", "100 ml"),
        ("Amaryll", "Botanelle", "Clair & Oud", "Lumiveda", "Pale Moth", "Solenne"),
    ),
    Department(
        "Sports",
        {
            "Running": ("running vest", "trail shoe", "hydration belt", "reflective band"),
            "Climbing": ("chalk bag", "climbing harness", "locking carabiner", "crash pad"),
            "Cycling": ("saddle bag", "bike helmet", "floor pump", "handlebar tape"),
            "Yoga": ("yoga mat", "cork block", "stretch strap", "meditation cushion"),
        },
        ("Ultralight", "Trail", "Alpine", "Carbon", "Merino", "Storm", "Aero", "Everyday"),
        ("slate grey", "signal orange", "waterproof", "recycled", "extra grip", "wide fit"),
        ("Cairnline", "Fellrunner", "Kestrel Peak", "Northbeta", "Rove", "Velmont"),
    ),
    Department(
        "Toys",
        {
            "Board games": ("strategy game", "card game", "jigsaw puzzle", "dice tower"),
            "Building": ("brick set", "marble run", "train track", "magnetic tile"),
            "Outdoor play": ("kite", "bubble wand", "scooter", "sand bucket"),
            "Pretend play": ("doll house", "tool bench", "tea set", "hand puppet"),
        },
        ("Pirate", "Dinosaur", "Space", "Forest", "Castle", "Robot", "Ocean", "Dragon"),
        ("ages 3 and up", "ages 6 and up", "wooden", "glow in the dark", "for the family", "mini"),
        ("Bumblekit", "Foxwagon", "Little Lantern", "Oddsocket", "Pebble & Pine", "Whirligig"),
    ),
    Department(
        "Books",
        {
            "Fiction": ("mystery novel", "family saga", "ghost story", "short story collection"),
            "Science": ("physics primer", "field guide", "popular history", "star atlas"),
            "Cooking": ("bread cookbook", "noodle cookbook", "pickling manual", "spice guide"),
            "Travel": ("walking guide", "city portrait", "sailing memoir", "train journal"),
        },
        ("Quiet", "Northern", "Illustrated", "Forgotten", "Complete", "Island", "Winter", "Modern"),
        ("paperback", "hardcover", "clothbound", "large print", "annotated", "pocket format"),
        ("Ashgrove Press", "Blue Heron", "Foliant", "Harbour Street", "Inkwell", "Meridian House"),
    ),
    Department(
        "Electronics",
        {
            "Audio": ("headphone", "bookshelf speaker", "record player", "clip microphone"),
            "Computing": ("mechanical keyboard", "laptop stand", "docking hub", "vertical mouse"),
            "Photography": ("camera strap", "tripod", "lens filter", "film scanner"),
            "Smart home": ("motion sensor", "smart plug", "door bell", "air monitor"),
        },
        ("Wireless", "Compact", "Studio", "Hi-res", "Rugged", "Retro", "Silent", "Modular"),
        ("USB-C", "long battery", "graphite", "silver", "with case", "noise cancelling"),
        ("Audenza", "Corvid Labs", "Halide Works", "Nimbusoft", "Pixelwright", "Tonal"),
    ),
    Department(
        "Garden",
        {
            "Plants": ("herb kit", "seed tin", "tulip bulb pack", "fern"),
            "Tools": ("hand trowel", "pruning shear", "garden fork", "hose reel"),
            "Outdoor living": ("fire bowl", "hammock", "picnic blanket", "string light"),
            "Wildlife": ("bird feeder", "bee hotel", "hedgehog house", "bird bath"),
        },
        ("Cottage", "Terracotta", "Galvanised", "Meadow", "Balcony", "Evergreen", "Cedar", "Sunny"),
        ("frost-proof", "organic", "weathered", "moss green", "self-watering", "stackable"),
        ("Bramble & Co", "Greenhithe", "Loamfield", "Old Orchard", "Sparrowgate", "Wildrow"),
    ),
)
