"""The words of the synthetic catalogue, and the titles, brands and categories made of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

__all__ = [
    "BRANDS",
    "DEPARTMENTS",
    "FINISHES",
    "NICHES_OF_DEPARTMENT",
    "PATHS",
    "STYLES",
    "VARIANTS",
    "Attributes",
    "Department",
    "item_table",
    "named",
    "numbered",
    "plural",
]


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


PATHS = [(d, a, n) for d in DEPARTMENTS for a, niches in d.aisles.items() for n in niches]
"""Every niche with its department and aisle, neighbors side by side."""

NICHES_OF_DEPARTMENT = len(PATHS) // len(DEPARTMENTS)
STYLES = len(DEPARTMENTS[0].styles)
FINISHES = len(DEPARTMENTS[0].finishes)
BRANDS = len(DEPARTMENTS[0].brands)


class Attributes(NamedTuple):
    """What items are like: one number an item, (n,) each; words as places in their lists."""

    niche: np.ndarray
    style: np.ndarray
    finish: np.ndarray
    variant: np.ndarray
    brand: np.ndarray
    popularity: np.ndarray
    quality: np.ndarray


def item_table(attributes: Attributes, *, start: int, count: int) -> pa.Table:
    """Describe the first ``count`` of some items, which are numbered from ``start``."""
    a = Attributes(*(values[:count] for values in attributes))
    words = _words()
    department = a.niche // NICHES_OF_DEPARTMENT

    def join(*parts: pa.Array | str) -> pa.Array:
        return pc.binary_join_element_wise(*parts, "")

    title = join(
        words["style"].take(pa.array(department * STYLES + a.style)),
        " ",
        words["noun"].take(pa.array(a.niche)),
        ", ",
        words["finish"].take(pa.array(department * FINISHES + a.finish)),
        words["variant"].take(pa.array(a.variant)),
    )
    brand = words["brand"].take(pa.array(department * BRANDS + a.brand))
    categories = words["categories"].take(pa.array(a.niche))
    return pa.table(
        {
            "item_id": numbered("P", start, count),
            "title": title,
            "brand": brand,
            "categories": categories,
            "text": join("Title: ", title, "; Brand: ", brand, "; Categories: ", categories),
            "popularity": pa.array(a.popularity.astype(np.float32)),
        }
    )


def numbered(letter: str, start: int, count: int) -> pa.Array:
    """Return the ids of ``count`` things from number ``start``, such as ``P0000012``."""
    return named(letter, np.arange(start, start + count))


def named(letter: str, numbers: np.ndarray) -> pa.Array:
    """Return the ids of things by their numbers (n,)."""
    digits = pc.utf8_lpad(pa.array(numbers).cast(pa.string()), 7, "0")
    return pc.binary_join_element_wise(letter, digits, "")


@cache
def _words() -> dict[str, pa.Array]:
    """Return the word lists in the order in which attributes count them."""
    lists = {
        "style": [s for d in DEPARTMENTS for s in d.styles],
        "finish": [f for d in DEPARTMENTS for f in d.finishes],
        "brand": [b for d in DEPARTMENTS for b in d.brands],
        "noun": [noun for _, _, noun in PATHS],
        "categories": [
            f"{d.name} > {aisle} > {plural(noun).capitalize()}" for d, aisle, noun in PATHS
        ],
        "variant": ["" if not v else f", {v}" for v in VARIANTS],
    }
    return {name: pa.array(words) for name, words in lists.items()}
